"""What people write to files, and read from them."""

import dataclasses
import io
import json

import torch

import cyclevae as cv
from cyclevae.diagnostics import cycle_report
from cyclevae.testing import toy_batch, toy_denoiser

_, TEXT, LATENT = toy_denoiser(seed=0)


def test_a_checkpoint_of_a_step_is_loaded_by_weights_alone():
    """Whose `torch.load` refuses code, since 2.6: https://github.com/pytorch/pytorch/pull/137602."""
    terms = [cv.Text(), cv.Latent(), cv.Prior("learned")]
    denoiser = toy_denoiser(seed=0)[0]
    objective = cv.CycleObjective(TEXT, LATENT, terms)
    module = cv.StepModule(denoiser, objective, cv.Teacher(denoiser.module))
    optimizer = torch.optim.AdamW(denoiser.module.parameters(), 0.1)
    module(toy_batch(seed=0), 0).loss.backward()
    optimizer.step()
    module.teacher.update(denoiser.module)
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = toy_denoiser(seed=1)[0]
    fresh = cv.StepModule(other, objective, cv.Teacher(other.module))
    fresh.load_state_dict(saved["module"])
    torch.optim.AdamW(other.module.parameters(), 0.1).load_state_dict(saved["optimizer"])
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    losses = [m(toy_batch(seed=0), 1, g).loss for m, g in zip((module, fresh), draws, strict=True)]
    assert torch.equal(*losses)


def test_a_report_becomes_json():
    """Who keeps a line of JSON for each evaluation."""
    denoiser = toy_denoiser(seed=0)[0]
    report = cycle_report(
        denoiser, toy_batch(rows=8), text_process=TEXT, latent_process=LATENT, samples=1
    )
    read = json.loads(json.dumps(dataclasses.asdict(report)))
    assert read["rows"] == 8 and len(read["z_hat"]) == len(report.z_hat)


def test_rows_that_share_memory():
    """Whose latents are one row, expanded: written to, they would change all together."""
    batch = toy_batch(rows=4)
    shared = batch.unpaired_latents[:1].expand(4, 4)
    given = batch._replace(unpaired_latents=shared)
    terms = [cv.Text(), cv.Latent(), cv.CycleText(), cv.CycleLatent()]
    cv.CycleObjective(TEXT, LATENT, terms)(toy_denoiser()[0], given, step=0).loss.backward()
    assert torch.equal(shared[0], batch.unpaired_latents[0])
