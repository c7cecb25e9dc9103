"""Latents of variable length: compiled, over ranks and accumulation steps, in a report."""

import math

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cyclevae as cv
from counters import HostSyncs
from cyclevae import diagnostics
from cyclevae.testing import check_ranks
from masked import KEPT, LATENT, PROCESSES, TEXT, Sequence, Z, denoiser
from test_latent_mask import OBJECTIVE, PER_ROW, batch, filled, run
from test_latent_padding import READS_PAIRS, value_and_gradients


def make(*more):
    terms = [
        term
        for term in PER_ROW
        if term.kind() not in ("unconditional", "prior") and term.name != "text"
    ]
    return cv.StepModule(denoiser(), cv.CycleObjective(TEXT, LATENT, [*terms, *more]))


def test_accumulation_over_latents_of_other_lengths_changes_no_gradient():
    check_ranks(make, [[batch(), batch(seed=5)]])


def test_a_report_sees_no_padding():
    def report(data):
        return str(diagnostics.cycle_report(denoiser(), data, samples=2, **PROCESSES))

    data = batch()
    assert report(filled(data, math.nan)) == report(filled(data, 0.0))
    assert report(data._replace(latent_mask=torch.ones(5, 4).bool())) != report(data)


def test_a_full_mask_is_none():
    full = torch.ones_like(KEPT)
    for name in READS_PAIRS.keys() - {"infonce_loss"}:
        masked, plain = value_and_gradients(name, Z, full), value_and_gradients(name, Z, None)
        for a, b in zip(masked, plain, strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(a, b) if a is not None else None


def test_a_masked_step_waits_for_no_value():
    network = Sequence().to("meta")
    data = cv.Batch(*[None if part is None else part.to("meta") for part in batch()])
    with HostSyncs() as syncs:
        output = OBJECTIVE(
            cv.as_denoiser(network), data, step=0, teacher=cv.Teacher(network).denoiser
        )
        output.loss.backward()
        OBJECTIVE.counts(data)
    assert syncs.found == []


def pooled():
    return make(
        cv.Prior("mmd", name="mmd", pool=True), cv.Prior("moment", name="moment", pool=True)
    )


def test_ranks_with_latents_of_other_lengths_change_no_gradient():
    more = batch(seed=5)
    fewer = cv.Batch(*[None if part is None else part[:3] for part in batch(seed=9)])
    check_ranks(pooled, [[more], [fewer]])


def test_an_objective_does_not_care_how_much_padding_there_is():
    short, long = batch(torch.float64), batch(torch.float64, n=7)

    def widened(z):
        return torch.cat([z, z.new_full((len(z), 3, z.shape[2]), math.nan)], dim=1)

    long = long._replace(
        latents=widened(short.latents), unpaired_latents=widened(short.unpaired_latents)
    )
    torch.testing.assert_close(run(OBJECTIVE, long), run(OBJECTIVE, short))


def test_a_compiled_step_takes_any_masks(fresh_compiler):
    terms = [cv.Latent(), cv.CycleText(bridge=cv.LatentBridge(threshold=0.3)), cv.Prior("moment")]
    d, counter = denoiser(), CompileCounterWithBackend("aot_eager")
    module = cv.StepModule(d, cv.CycleObjective(TEXT, LATENT, terms))
    fast = torch.compile(module, fullgraph=True, backend=counter)
    for seed in (0, 5):
        found = []
        for step in (fast, module):
            torch.manual_seed(0)
            loss = step(filled(batch(seed=seed), math.nan), step=0).loss
            found.append([loss, *torch.autograd.grad(loss, list(d.module.parameters()))])
        torch.testing.assert_close(*found)
    assert counter.frame_count == 1
