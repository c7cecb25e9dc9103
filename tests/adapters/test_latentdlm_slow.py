"""The adapter of the host: its own modes untouched, and `cycle_vae` as the config says."""

import copy
import logging
from collections import UserList

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counters import HostSyncs
from cyclevae.adapters.latentdlm import Marked, collate_marks, with_cycle
from cyclevae.adapters.latentdlm import trainer as trainer_module
from cyclevae.adapters.latentdlm.host import (
    HostDenoiser,
    HostSchedule,
    latent_process_of,
    text_process_of,
)
from cyclevae.adapters.latentdlm.trainer import rows_of
from cyclevae.gradient_policy.policy import GradientPolicy
from latentdlm_host import FLAVOURS, Trainer, make_batch, make_host

BASE = {"cycle_text_weight": 0.0, "cycle_latent_weight": 0.0}
PARTS = ["epsilon", "x0", "v_param"]


def cycle(**options):
    return with_cycle(make_host(loss_type="cycle_vae", **options))


def read_cycle(**options):
    """The same, whose model returns its logits: one does whose head has hooks."""
    host = make_host(loss_type="cycle_vae", **options)
    host.model.text_head.register_forward_hook(lambda head, inputs, logits: None)
    return with_cycle(host)


def step(trainer, batch, number=0, seed=1):
    """Loss and metrics of a step from a seed, after its backward."""
    torch.manual_seed(seed)
    loss, metrics = trainer(batch, step=number)
    loss.backward()
    return loss, metrics


def gradients(trainer):
    return {name: p.grad for name, p in trainer.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


class Passes:
    """The calls of the model inside: their arguments and outputs."""

    def __init__(self, trainer):
        self.model, self.calls, self.outputs = trainer.model, [], []

    def __enter__(self):
        self.handle = self.model.register_forward_hook(self.note, with_kwargs=True)
        return self

    def __exit__(self, *exception):
        self.handle.remove()

    def note(self, model, arguments, options, output):
        self.calls.append({k: None if v is None else v.clone() for k, v in options.items()})
        self.outputs.append(output)


# The host's own modes

PHASES = [{"type": "l2t", "steps": 2, "epochs": 1}, {"type": "t2l", "steps": 1, "epochs": 2}]
MODES = {
    "unconditional": {},
    "l2t": {},
    "t2l": {},
    "random": {"training": {"mode_weights": [1.0, 2.0, 1.0]}},
    "sequential": {"training": {"sequential_schedule": PHASES}},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_the_hosts_bit_for_bit(mode, flavour):
    options = {"flavour": flavour, "loss_type": mode, "dropout": 0.1, **MODES[mode]}
    results = []
    for wrap in (with_cycle, lambda host: host):
        trainer, found = wrap(make_host(**options)), []
        np.random.seed(2)
        torch.manual_seed(2)
        for number in range(4):
            trainer.zero_grad()
            loss, metrics = trainer(make_batch(seed=number), step=number)
            loss.backward()
            found.append((loss, metrics, gradients(trainer)))
        results.append(found)
    for (loss, metrics, grads), (other, expected, their_grads) in zip(*results, strict=True):
        assert torch.equal(loss, other)
        assert metrics == expected
        assert type(metrics["training_mode"]) is str
        assert_same(grads, their_grads)


def test_the_epoch_reaches_the_host():
    trainer = with_cycle(make_host(loss_type="sequential", **MODES["sequential"]))
    modes = []
    for trainer.current_epoch in range(4):
        modes.append(trainer(make_batch())[1]["training_mode"])
    assert modes == ["l2t", "t2l", "t2l", "l2t"]
    assert trainer.host.current_epoch == trainer.current_epoch == 3


# Passes

PASSES = {
    "all": (4, {"prior_weight": 0.1}),
    "no prior": (4, {}),
    "text cycle": (3, {"cycle_latent_weight": 0.0}),
    "latent cycle": (3, {"cycle_text_weight": 0.0}),
    "base": (2, BASE),
    "latent times": (5, {"latent_t_mode": "random"}),
    "text times": (5, {"text_t_mode": "random"}),
}


@pytest.mark.parametrize(("count", "options"), PASSES.values(), ids=PASSES)
def test_passes(count, options):
    trainer = cycle(**options)
    with Passes(trainer) as passes:
        loss, _ = step(trainer, make_batch())
    assert len(passes.calls) == count == trainer._objective.passes(0)
    assert loss.isfinite()
    assert all(p.grad is not None for p in trainer.parameters())


@pytest.mark.parametrize("clusters", [0, 4])
def test_text_heads_run_on_no_position(clusters):
    trainer, shapes = cycle(cluster_size=clusters), []
    heads = [trainer.model.text_head, *([trainer.model.text_head_clusters] if clusters else [])]
    for head in heads:
        head.register_forward_hook(lambda head, i, output: shapes.append(tuple(output.shape)))
    with Passes(trainer) as passes:
        loss, metrics = step(trainer, make_batch())
    assert loss.isfinite() and metrics["text_loss"] > 0
    assert all(len(output) == 2 + bool(clusters) for output in passes.outputs)
    full, none = (4, 12, 40), (4, 0, 40)
    assert shapes == [none] * 4 * len(heads)
    assert all(tuple(output[0].shape) == none for output in passes.outputs)
    call = {key: value.to(torch.float32) for key, value in passes.calls[0].items()}
    call["text_tokens"] = passes.calls[0]["text_tokens"]
    assert trainer.model(**call)[0].shape == full


def test_unread_logits_teach_what_logits_do():
    found = []
    for unread in (True, False):
        trainer = cycle()
        if not unread:
            trainer._plain.head = None
        loss, _ = step(trainer, make_batch())
        found.append((loss.detach(), gradients(trainer)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_failed_pass_leaves_the_heads_as_they_were():
    trainer = cycle()
    handle = trainer.model.mmdit.register_forward_hook(lambda *_: 1 / 0)
    for number in range(2):
        with pytest.raises(ZeroDivisionError):
            trainer(make_batch(), step=number)
    handle.remove()
    assert not trainer._plain.unread
    trainer.host.loss_type = "l2t"
    assert trainer.host(make_batch())[0].isfinite()


@pytest.mark.parametrize("clusters", [0, 4])
def test_the_heads_have_the_roles(clusters):
    roles = HostDenoiser(make_host(cluster_size=clusters).model).roles
    assert roles.encoder_only == ("latent_head.*",)
    assert roles.decoder_only == ("text_head.*", "text_head_clusters.*")[: 1 + bool(clusters)]


def denoise(tokens, need="both"):
    batch, time = make_batch(), torch.ones(4)
    mask = batch["attention_mask"].bool()
    times = {"text_time": time, "latent_time": time, "attention_mask": mask}
    return HostDenoiser(make_host().model).denoise(tokens, batch["latent"], **times, need=need)


def test_a_pass_gives_what_is_needed_alone():
    for need, given in {"logits": (1, 0), "latents": (0, 1), "both": (1, 1)}.items():
        output = denoise(make_batch()["input_ids"], need)
        parts = output.logits, output.latent_prediction
        assert tuple(part is not None for part in parts) == given


@pytest.mark.unhooked
def test_a_relaxed_text_is_refused():
    with pytest.raises(TypeError, match="reads ids, and a relaxed text is none"):
        denoise(F.one_hot(make_batch()["input_ids"], 40).float())


def test_columns_that_stand_for_no_token_are_never_chosen():
    host = make_host(vocab=40)
    host.tokenizer.vocab_size = 37
    process = text_process_of(host, "all")
    assert process.vocab_size == 40 and process.special_ids == (37, 38, 39)
    del host.model.text_head
    assert text_process_of(host, "all").vocab_size == 37


def test_shapes_of_latents_and_kinds_of_masks():
    trainer, batch = cycle(prior_weight=0.1), make_batch()
    expected, _ = step(trainer, batch)
    wide = {**batch, "latent": batch["latent"][:, None]}
    masks = [batch["attention_mask"].to(dtype) for dtype in (torch.bool, torch.long)]
    for other in (wide, *({**batch, "attention_mask": mask} for mask in masks)):
        assert torch.equal(step(trainer, other)[0], expected)
    absent = {k: v for k, v in batch.items() if k != "attention_mask"}
    with pytest.raises(ValueError, match=r"keeps positions of .* that hold the padding id 0"):
        step(trainer, absent)
    full = {**absent, "input_ids": absent["input_ids"].clamp(min=3)}
    ones = {**full, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert torch.equal(step(trainer, full)[0], step(trainer, ones)[0])


def test_wrong_latents():
    trainer, batch = cycle(), make_batch()
    with pytest.raises(ValueError, match="no `latent`: mark rows"):
        trainer({k: v for k, v in batch.items() if k != "latent"}, step=0)
    for latents in (batch["latent"][:3], batch["latent"][:, None].expand(4, 2, 8)):
        with pytest.raises(ValueError, match=r"\[b, d\] or \[b, 1, d\] with b = 4, got"):
            trainer({**batch, "latent": latents}, step=0)


# Base losses


@pytest.mark.parametrize("flavour", ["stable", "plain"])
def test_the_text_loss_is_the_hosts(flavour):
    batch = make_batch()
    expected = make_host(flavour=flavour)(batch)[1]
    loss, metrics = step(cycle(flavour=flavour, **BASE), batch)
    assert metrics["text_loss"].item() == pytest.approx(expected["text_loss"], rel=1e-6)
    assert metrics["text_accuracy"].item() == pytest.approx(expected["text_accuracy"], rel=1e-6)
    weight = {"stable": 0.1, "plain": 1.0}[flavour]
    total = metrics["text_loss"] + weight * metrics["latent_loss"]
    torch.testing.assert_close(loss.detach(), total)


@pytest.mark.parametrize("parameterization", PARTS)
@pytest.mark.parametrize("flavour", ["stable", "plain"])
def test_the_latent_loss_is_the_hosts(flavour, parameterization):
    batch, options = make_batch(), {"parameterization": parameterization, "flavour": flavour}
    host = make_host(loss_type="t2l", latent_loss_weight=0.3, **options)
    torch.manual_seed(1)
    total, expected = host(batch)
    trainer = cycle(text_loss_weight=0.0, latent_loss_weight=0.3, **BASE, **options)
    loss, metrics = step(trainer, batch)
    # the host leaves 1.6e-5 of the latent in at full noise
    assert metrics["latent_loss"].item() == pytest.approx(expected["latent_loss"], rel=2e-4)
    assert loss.item() == pytest.approx(total.item(), rel=2e-4)


def test_the_corrected_latent_loss_is_the_error_itself():
    batch = make_batch()
    torch.manual_seed(1)
    expected = make_host(flavour="plain", loss_type="t2l")(batch)[1]["latent_loss"]
    trainer = cycle(base_loss="corrected", latent_loss_weight=0.3, text_loss_weight=0.0, **BASE)
    loss, metrics = step(trainer, batch)
    assert metrics["latent_loss"].item() == pytest.approx(expected, rel=2e-4)
    assert loss.item() == pytest.approx(0.3 * expected, rel=2e-4)


@pytest.mark.parametrize("parameterization", ["x0", "v_param"])
def test_times_are_drawn_as_in_the_fork(parameterization):
    trainer = read_cycle(
        flavour="fork",
        parameterization=parameterization,
        text_t_mode="random",
        latent_t_mode="random",
        **BASE,
    )
    host, batch = trainer.host, make_batch(64)
    ids, z = batch["input_ids"], batch["latent"]
    with Passes(trainer) as passes:
        _, metrics = step(trainer, batch)
    (decode, encode), (out, encoded) = passes.calls, passes.outputs
    text_time, latent_time = decode["text_timesteps"], encode["latent_timesteps"]
    assert (decode["latent_timesteps"] == 0).all() and (encode["text_timesteps"] == 0).all()
    assert torch.equal(encode["text_tokens"], ids)
    for time in (text_time, latent_time):
        assert 0 <= time.min() < 0.1 and 0.9 < time.max() <= 1
        assert time.mean().item() == pytest.approx(0.5, abs=0.05)
    hidden = decode["text_tokens"] == host.mask_token_id
    assert torch.equal(decode["text_tokens"][~hidden], ids[~hidden])
    share = hidden.float().mean(dim=1)
    assert torch.corrcoef(torch.stack([share, text_time]))[0, 1] > 0.8
    text_loss = host._text_loss(out[0], ids, hidden)
    torch.testing.assert_close(metrics["text_loss"], text_loss.detach(), rtol=1e-5, atol=0)
    a, b = (value[:, None] for value in host.latent_diffusion.get_schedule_values(latent_time))
    noise = (encode["latents"][:, 0] - a * z) / b
    _, target = host.latent_diffusion.add_noise(z, latent_time, noise)
    latent_loss = host._latent_loss(encoded[1], target[:, None])
    torch.testing.assert_close(metrics["latent_loss"], latent_loss.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("padding", ["host", "first", "exclude"])
def test_padding_counts_as_the_config_says(padding):
    trainer, batch = read_cycle(text_loss_padding=padding, **BASE), make_batch()
    ids, kept = batch["input_ids"], batch["attention_mask"].bool()
    counted = {
        "host": torch.ones_like(kept),
        "first": kept | ((~kept).cumsum(1) == 1),
        "exclude": kept,
    }[padding]
    with Passes(trainer) as passes:
        _, metrics = step(trainer, batch)
    decode, logits = passes.calls[0], passes.outputs[0][0]
    assert torch.equal(decode["text_tokens"] == trainer.mask_token_id, counted)
    assert torch.equal(decode["attention_mask"].bool(), kept)
    expected = F.cross_entropy(logits[counted], ids[counted])
    torch.testing.assert_close(metrics["text_loss"], expected.detach())
    assert len({int(kept.sum()), int(counted.sum()), kept.numel()}) >= 2


# Precision and tables


def test_bf16_looks_times_up_in_fp32(monkeypatch):
    looked_up, call = [], HostSchedule.__call__
    monkeypatch.setattr(
        HostSchedule, "__call__", lambda self, time: looked_up.append(time) or call(self, time)
    )
    trainer = cycle(
        dtype=torch.bfloat16, latent_t_mode="random", text_t_mode="random", prior_weight=0.1
    )
    looked_up.clear()
    with Passes(trainer) as passes:
        loss, metrics = step(trainer, make_batch())
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(value.isfinite() for value in metrics.values())
    assert all(p.grad.isfinite().all() for p in trainer.parameters())
    assert {time.dtype for time in looked_up} <= {torch.float32, torch.float64}
    drawn = [t for t in looked_up if not ((t == 0) | (t == 1)).all()]
    assert drawn and any((t != t.bfloat16().float()).any() for t in drawn)
    for call in passes.calls:
        assert call["text_timesteps"].dtype == call["latent_timesteps"].dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
def test_the_tables_are_the_hosts(steps, beta_schedule):
    host = make_host()
    host.latent_diffusion = type(host.latent_diffusion)(
        steps, beta_schedule, parameterization="v_param"
    )
    schedule = latent_process_of(host, 10.0).schedule
    grid = torch.linspace(0, 1, 3001)
    with HostSyncs("cpu") as syncs:
        found = schedule(grid)
    assert syncs.found == []
    with HostSyncs("cpu") as syncs:
        expected = host.latent_diffusion.get_schedule_values(grid)
    assert syncs.found  # its own asks for the largest time
    for values, theirs in zip(found, expected, strict=True):
        assert torch.equal(values, theirs)


# Evaluation


def test_evaluation_draws_for_itself():
    trainer, batch = cycle(prior_weight=0.1, cycle_every=5), make_batch()
    step(trainer, batch, 7)
    state = torch.get_rng_state()
    trainer.eval()
    with torch.no_grad():
        first, metrics = trainer(batch)
        second, _ = trainer(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.host.current_step == 7
    assert not first.requires_grad and first.isfinite()
    assert first != second
    assert {"cycle_text_loss", "cycle_latent_loss", "prior_loss"} <= metrics.keys()
    trainer.train()
    assert "cycle_text_loss" not in step(trainer, batch, 8)[1]
    trainer.eval()
    with torch.no_grad():
        again = [trainer(batch)[0] for _ in range(2)]
    assert torch.equal(torch.stack(again), torch.stack([first, second]))


def test_evaluation_weighs_as_the_last_step_did():
    trainer, batch = cycle(cycle_warmup_steps=3), make_batch()
    assert "cycle_text_loss" not in trainer(batch)[1]
    step(trainer, batch, 3)
    assert "cycle_text_loss" in trainer(batch)[1]


@pytest.mark.parametrize(
    "options",
    [{"cycle_every": 5}, {"cycle_p_dual": 0.01}, {"cycle_fraction": 0.25}, {"cycle_pairs": False}],
)
def test_evaluation_runs_every_cycle_on_every_row(options):
    batch = make_batch()
    assert torch.equal(cycle(**options)(batch)[0], cycle()(batch)[0])


def test_the_seed_is_that_of_evaluations_too():
    batch = make_batch()
    first, again, other = (cycle(cycle_seed=seed)(batch)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_evaluation_hides_no_bad_term():
    trainer, batch = cycle(), make_batch()
    trainer.model.text_head.bias.data.fill_(torch.nan)
    assert trainer(batch, step=0)[0].isfinite()
    assert trainer(batch)[0].isnan()


# Bad rows


def spoil(batch, rows, what):
    batch = {key: value.clone() for key, value in batch.items()}
    for row in rows:
        if what == "blank":
            for value in batch.values():
                value[row] = 0
        else:
            batch["latent"][row, :3] = what
    return batch


@pytest.mark.parametrize("what", [torch.nan, torch.inf, "blank"])
def test_a_bad_row_is_a_marked_one(what):
    batch, rows = make_batch(5), torch.tensor([True, False, True, True, False])
    results = []
    marks = {"has_latent": rows} | ({"has_text": rows} if what == "blank" else {})
    for given in (spoil(batch, [1, 4], what), {**batch, **marks}):
        trainer = cycle(prior_weight=0.1)
        loss, metrics = step(trainer, given)
        assert loss.isfinite() and loss.requires_grad
        assert all(p.grad.isfinite().all() for p in trainer.parameters())
        results.append((metrics, gradients(trainer)))
    for mine, marked in zip(*results, strict=True):
        assert_same(mine, marked)


def test_a_mark_does_not_mend_a_row():
    batch = spoil(make_batch(), [1], "blank")
    marks = {name: torch.tensor([True, True, False, True]) for name in ("has_text", "has_latent")}
    found = rows_of({**batch, **marks})
    assert found.has_text.tolist() == found.has_latent.tolist() == [True, False, False, True]


def test_half_precision_latents_are_widened():
    for given, kept in {torch.bfloat16: torch.float32, torch.float64: torch.float64}.items():
        batch = make_batch()
        assert rows_of({**batch, "latent": batch["latent"].to(given)}).latents.dtype == kept


@pytest.mark.parametrize("what", [torch.nan, "blank"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_batch_of_bad_rows(what, flavour):
    base = {} if what == "blank" else {**BASE, "text_loss_weight": 1.0}
    trainer = cycle(flavour=flavour, prior_weight=0.1 if what == "blank" else 0.0, **base)
    loss, metrics = step(trainer, spoil(make_batch(), range(4), what))
    assert loss.item() == 0 and loss.requires_grad
    assert all(value.isfinite() for value in metrics.values())
    for parameter in trainer.parameters():
        assert parameter.grad is None or not parameter.grad.any()


# Keys


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("cycle_text_wieght", "cycle_text_weight"),
        ("prior_wieght", "prior_weight"),
        ("base_los", "base_loss"),
        ("text_loss_wieght", "text_loss_weight"),
        ("latent_t_mod", "latent_t_mode"),
    ],
)
def test_a_typo_is_named(key, nearest):
    with pytest.raises(ValueError, match=f"`loss.{key}`; did you mean '{nearest}'"):
        cycle(**{key: 1.0})
    with pytest.raises(ValueError, match=f"`loss.{key}`"):
        with_cycle(make_host(loss_type="l2t", **{key: 1.0}))


BOTH = ("cycle_text", "cycle_latent")
REACHES = {
    "text_loss_weight": (2.0, "text.weight"),
    "latent_loss_weight": (0.3, "latent.weight"),
    "unconditional_loss_weight": (0.5, "unconditional.weight"),
    "prior_weight": (0.5, "prior.weight"),
    "prior_name": ("moment", "prior.prior"),
    "prior_options": ({"variance": 0.5}, "prior.options"),
    "prior_pool": (True, "prior.pool"),
    "cycle_text_weight": (2.0, "cycle_text.weight"),
    "cycle_latent_weight": (2.0, "cycle_latent.weight"),
    "cycle_show_latent": (True, "cycle_latent.show_latent"),
    "cycle_latent_distance": ("cosine", "cycle_latent.distance"),
    "cycle_latent_sampling": ("categorical", "cycle_latent.bridge.name"),
    "cycle_p_dual": (0.3, *(f"{term}.weight.together" for term in BOTH)),
    "cycle_every": (2, *(f"{term}.every" for term in BOTH)),
    "cycle_fraction": (0.5, *(f"{term}.fraction" for term in BOTH)),
    "cycle_pairs": (False, *(f"{term}.pairs" for term in BOTH)),
    "cycle_non_finite": ("raise", "objective.non_finite"),
    "cycle_seed": (7, "objective.seed"),
    "cycle_max_gain": (5.0, "objective.latent_process.max_gain"),
    "cycle_bridge_steps": (2, "cycle_text.bridge.steps", "prior.bridge.steps"),
    "cycle_bridge_noise": (0.1, "cycle_text.bridge.noise"),
    "cycle_bridge_norm": (3.0, "cycle_text.bridge.norm", "prior.bridge.norm"),
    "cycle_bridge_threshold": (2.0, "cycle_text.bridge.threshold", "prior.bridge.threshold"),
    "cycle_text_policy": ("full", "cycle_text.policy.bridge", "prior.through"),
}


def told(path, **options):
    """An option of a term, or of the objective; None where there is none."""
    objective = cycle(**options)._objective
    name, *names = path.split(".")
    found = {"objective": objective, **terms_of(objective)}.get(name)
    for name in names:
        found = getattr(found, name, None)
    return found


def terms_of(objective):
    return {term.name: term for term in objective.terms}


@pytest.mark.parametrize("key", REACHES)
def test_a_key_reaches_the_objective(key):
    value, *paths = REACHES[key]
    options = {"prior_weight": 1.0}
    for path in paths:
        assert told(path, **options) != value
        assert told(path, **{**options, key: value}) == value


def test_turns_know_when_the_cycles_run():
    options = {"cycle_p_dual": 0.5, "cycle_every": 3, "cycle_seed": 4}
    for turn, term in enumerate(BOTH):
        weight = told(f"{term}.weight", **options)
        assert (weight.turn, weight.of, weight.every, weight.seed) == (turn, 2, 3, 4)


def test_a_term_without_a_weight_is_left_out():
    objective = cycle(**BASE, text_loss_weight=0.0)._objective
    assert list(terms_of(objective)) == ["latent"]
    with pytest.raises(ValueError, match="every weight under `loss` is 0"):
        cycle(**BASE, text_loss_weight=0.0, latent_loss_weight=0.0)


def test_policies_by_their_keys():
    options = {"cycle_stop_grad_latent": False, "cycle_latent_sampling": "rloo"}
    terms = terms_of(cycle(**options, cycle_latent_policy="full")._objective)
    assert [terms[name].policy.bridge for name in BOTH] == ["full", "full"]
    terms = terms_of(cycle()._objective)
    assert [terms[name].policy.bridge for name in BOTH] == ["detach", "detach"]
    given = {"cycle_text_policy": {"bridge": "last", "freeze": UserList(["shared"])}}
    assert told("cycle_text.policy", **given) == GradientPolicy("last", ("shared",))


@pytest.mark.parametrize(
    ("options", "through"),
    [
        ({}, "last"),
        ({"cycle_stop_grad_latent": False}, "full"),
        ({"cycle_text_policy": "decoder_isolated", "cycle_stop_grad_latent": False}, "last"),
        ({"cycle_text_policy": "alternating"}, "full"),
        ({"cycle_text_policy": {"bridge": "full"}}, "full"),
        ({"cycle_text_policy": {"bridge": "last"}}, "last"),
    ],
)
def test_the_prior_shares_the_passes_of_the_text_cycle(options, through):
    options = {"cycle_bridge_steps": 3, "prior_weight": 0.1, **options}
    assert told("prior.through", **options) == through
    trainer = cycle(**options)
    alone = cycle(**{**options, "prior_weight": 0.0})
    for number in range(2):
        assert trainer._objective.passes(number) == alone._objective.passes(number)


def test_options_of_the_prior_become_plain():
    given = {"mean": UserList([0.5] * 8), "variance": "5e-1"}
    options = told("prior.options", prior_weight=1.0, prior_name="moment", prior_options=given)
    assert options["mean"].tolist() == [0.5] * 8
    assert options["variance"] == 0.5
    assert type(options) is dict


def test_numbers_as_yaml_reads_them():
    assert told("cycle_text.weight", cycle_text_weight="1e-1") == 0.1
    assert told("cycle_text.bridge.steps", cycle_bridge_steps="2") == 2
    for weight in ({"cycle_warmup_steps": 5e3}, {"cycle_text_warmup_steps": 5e3}):
        steps = told("cycle_text.weight.warmup_steps", **weight)
        assert steps == 5000 and type(steps) is int


def test_random_times_keep_their_ends():
    options = {"latent_t_mode": "random", "cycle_latent_t_max": 0.9, "text_t_mode": "random"}
    terms = terms_of(cycle(**options, cycle_latent_t_min=0.8, prior_weight=0.1)._objective)
    ends = {name: (term.time.low, term.time.high) for name, term in terms.items()}
    bridges = dict.fromkeys((*BOTH, "prior"), (0.8, 0.9))
    assert ends == {"text": (1e-4, 1 - 1e-4), "latent": (0.0, 1.0), **bridges}
    for name in BOTH:
        assert told(f"{name}.time", **options) == 0.9
        assert told(f"{name}.time", cycle_latent_t_min=0.8, cycle_latent_t_max=0.9) == 1.0


def test_the_stable_file_caps_its_losses():
    def caps(**options):
        terms = terms_of(cycle(prior_weight=0.1, **options)._objective)
        return {name: term.cap for name, term in terms.items() if term.cap is not None}

    assert caps(flavour="stable") == {"text": 100.0, "latent": 10.0}
    assert caps(flavour="plain") == caps(base_loss="corrected") == {}


def test_a_compiled_run_does_not_look_for_bad_terms():
    found = [
        cycle(cycle_non_finite=key, training={"compile_model": compiles})._objective.non_finite
        for key in ("zero", "raise")
        for compiles in (False, True)
    ]
    assert found == ["zero", None, "raise", "raise"]


def test_keys_of_the_host_are_left_to_it():
    own = {"loss_scale": 1.0, "reduction": "tokenmean", "use_cross_entropy": True}
    trainer = cycle(**own, text_kl_weight=0.1, hard_rate=1)  # the fourth looks like one of ours
    assert trainer(make_batch(), step=0)[0].isfinite()


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"base_loss": "hosts"}, "`loss.base_loss` is 'hosts'; did you mean 'host'"),
        ({"text_t_mode": "all"}, "`loss.text_t_mode` is 'all'; known are"),
        ({"latent_t_mode": "ful"}, "`loss.latent_t_mode` is 'ful'; did you mean 'full'"),
        ({"text_loss_padding": "last"}, "`loss.text_loss_padding` is 'last'"),
        ({"prior_name": "teacher"}, "`loss.prior_name` is 'teacher'"),
        (
            {"prior_name": "learned", "prior_weight": 1.0},
            "a frozen model of latents: set `loss.prior_teacher` to a checkpoint.pt",
        ),
        ({"cycle_dead_steps": 0}, "`loss.cycle_dead_steps` must be an integer of at least 1"),
        ({"cycle_start_step": -1}, "`loss.cycle_start_step` must be an integer of at least 0"),
        ({"cycle_latent_sampling": "soft"}, "encoder reads ids, so it must be one of 'argmax'"),
        ({"cycle_non_finite": "skip"}, "zero, raise or null, got 'skip'"),
        ({"cycle_checkpoint_passes": "yes"}, "must be true or false, got 'yes'"),
        ({"cycle_stop_grad_latent": 1}, "must be true or false, got 1"),
        ({"latent_t_mode": "random", "cycle_latent_t_min": 0.0}, "start from pure noise"),
        ({"latent_t_mode": "random", "cycle_latent_t_max": 1.5}, "0 <= min <= max <= 1"),
        (
            {"latent_t_mode": "random", "cycle_latent_t_min": 0.95, "cycle_latent_t_max": 0.9},
            "0 <= min <= max <= 1, got 0.95 and 0.9",
        ),
        ({"cycle_text_weight": -1.0}, "`loss.cycle_text_weight` must be a finite number of at"),
        ({"text_loss_weight": None}, "`loss.text_loss_weight` must be a number, got None"),
        ({"cycle_warmup_steps": -1}, "`loss.cycle_warmup_steps` must be an integer of at least 0"),
        ({"prior_ramp_steps": 0.5}, "`loss.prior_ramp_steps` must be an integer or None, got 0.5"),
        ({"cycle_text_policy": "fool"}, "`loss.cycle_text_policy` is 'fool'; known are"),
        ({"cycle_text_policy": {"bridge": "on"}}, "`loss.cycle_text_policy.bridge` must be 'det"),
        ({"cycle_text_policy": {"brige": "last"}}, "unknown key `loss.cycle_text_policy.brige`"),
        ({"cycle_latent_policy": "full"}, "`loss.cycle_latent_sampling` 'argmax': `rloo` is the"),
        ({"cycle_latent_sampling": "rloo"}, "`loss.cycle_latent_policy` is 'stop_gradient' and"),
        (
            {"cycle_latent_policy": {"bridge": "full"}},
            "`loss.cycle_latent_sampling` 'argmax': `rloo`",
        ),
        (
            {"cycle_latent_distance": "cos"},
            "`loss.cycle_latent_distance` is 'cos'; did you mean 'cosine'",
        ),
        ({"cycle_bridge_steps": 0}, "`loss.cycle_bridge_steps` must be an integer of at least 1"),
        ({"cycle_bridge_noise": -1.0}, "`loss.cycle_bridge_noise` must be a finite number of at"),
        ({"cycle_bridge_norm": 0.0}, "`loss.cycle_bridge_norm` must be above 0"),
        (
            {"cycle_bridge_threshold": 0.0, "cycle_text_weight": 0.0, "prior_weight": 1.0},
            "`loss.cycle_bridge_threshold` must be above 0",
        ),
        ({"cycle_max_gain": 0.0}, "`loss.cycle_max_gain` must be above 0"),
        ({"cycle_every": 0}, "`loss.cycle_every` must be an integer of at least 1, got 0"),
        ({"cycle_fraction": 0.0}, r"`loss.cycle_fraction` must lie in \(0, 1\], got 0.0"),
        ({"cycle_p_dual": 1.5}, r"`loss.cycle_p_dual` must lie in \[0, 1\], got 1.5"),
        ({"cycle_p_dual": 0.5, "cycle_text_weight": 0.0}, "`loss.cycle_p_dual` = 0.5 lets the cyc"),
        ({"cycle_seed": "one"}, "`loss.cycle_seed` must be an integer, got 'one'"),
        ({"prior_options": {"varianc": 1.0}}, "`loss.prior_options.varianc`; did you mean 'varia"),
        ({"prior_options": {"time": 1.0}}, "unknown key `loss.prior_options.time`; known are"),
        ({"prior_options": {"variance": "big"}}, "`loss.prior_options.variance` must be a number"),
        (
            {"prior_options": {"variance": -1.0}, "prior_weight": 1.0},
            "`loss.prior_options`: `variance` must be a finite number of at least 0, got -1.0",
        ),
        ({"parameterization": "score"}, "`latent_parameterization` is 'score'; known are"),
    ],
)
def test_values_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        cycle(**options)


def test_an_unknown_mode():
    with pytest.raises(
        ValueError,
        match="'cycle_vea', for which the host trains 'unconditional' without a word; did you "
        "mean 'cycle_vae'",
    ):
        with_cycle(make_host(loss_type="cycle_vea"))
    host = make_host(loss_type="cycle_vae", training={"loss_type": "l2t"})
    with pytest.raises(ValueError, match=r"`training.loss_type` is 'l2t' and `loss.loss_type` is"):
        with_cycle(host)
    with_cycle(make_host(loss_type="l2t", training={"loss_type": "l2t"}))


def test_keys_without_a_use_are_logged_once(caplog):
    caplog.set_level(logging.INFO, "cyclevae")
    trainer = with_cycle(make_host(cycle_text_weight=2.0, prior_weight=1.0, base_loss="host"))
    for number in range(2):
        trainer(make_batch(), step=number)
    assert caplog.messages == [
        "cyclevae: loss_type l2t does not use cycle_text_weight, prior_weight"
    ]
    caplog.clear()
    unused = {"cycle_latent_t_max": 0.9, "cycle_stop_grad_latent": False}
    cycle(cycle_text_policy="full", parameterization="x0", **unused)
    assert caplog.messages == [
        "cyclevae: no effect here: cycle_latent_t_max, cycle_stop_grad_latent"
    ]


def test_one_line_at_the_first_step(caplog):
    caplog.set_level(logging.INFO, "cyclevae")
    warm_up = {"cycle_warmup_steps": 5, "cycle_latent_warmup_steps": 0}
    trainer = cycle(prior_weight=0.5, parameterization="x0", **warm_up)
    trainer(make_batch())  # an evaluation says nothing
    for number in range(2, 5):
        trainer(make_batch(), step=number)
    assert caplog.messages == [
        "cyclevae: step 2: text 1, latent 0.1, cycle_latent 0.1, cycle_text from step 5, prior "
        "from step 5; 3 passes"
    ]


def test_the_first_rank_speaks_alone(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "cyclevae")
    monkeypatch.setattr(trainer_module, "this_rank", lambda: 1)
    cycle()(make_batch(), step=0)
    assert caplog.messages == []


@pytest.mark.parametrize(("parameterization", "warns"), [("x0", False), ("v_param", True)])
def test_what_the_samplers_of_the_host_misread_is_said(parameterization, warns, caplog):
    cycle(parameterization=parameterization)
    assert ("the host's T2L samplers take the prediction" in caplog.text) is warns


def test_other_classes():
    older = type("MultimodalDiffusionTrainer", (Trainer,), {})
    host = make_host()
    host.__class__ = older
    with pytest.raises(TypeError, match="got MultimodalDiffusionTrainer, the host's older class"):
        with_cycle(host)
    with pytest.raises(TypeError, match="got Linear, which lacks model, tokenizer, text_noise"):
        with_cycle(torch.nn.Linear(1, 1))
    host = make_host()
    del host.latent_diffusion
    with pytest.raises(TypeError, match="which lacks latent_diffusion"):
        with_cycle(host)


WAYS_OUT = {
    "v": {"parameterization": "v_param"},
    "x0": {"parameterization": "x0"},
    "lower times": {
        "latent_t_mode": "random",
        "cycle_latent_t_max": 0.9,
        "cycle_bridge_steps": 4,
    },
    "no cycles": {**BASE, "prior_weight": 0.0},
}


def test_epsilon_at_full_noise_is_refused():
    for weights in (
        {},
        {"cycle_latent_weight": 0.0},
        {"cycle_text_weight": 0.0},
        {**BASE, "prior_weight": 1.0},
        {"latent_t_mode": "random"},
        {"latent_t_mode": "random", "cycle_latent_t_min": 0.9},
    ):
        with pytest.raises(ValueError, match="latent_parameterization is epsilon") as error:
            cycle(parameterization="epsilon", **weights)
    for way in ("latent_parameterization: x0", "loss.cycle_latent_t_max: 0.9", *BASE):
        assert way in str(error.value)


@pytest.mark.parametrize("options", WAYS_OUT.values(), ids=WAYS_OUT)
def test_the_ways_out_of_epsilon(options):
    trainer = cycle(**{"parameterization": "epsilon", **options})
    loss, metrics = step(trainer, make_batch())
    assert loss.isfinite()
    assert all(value.isfinite() for value in metrics.values())


def test_warmups_are_shared_and_can_differ():
    trainer = cycle(
        cycle_warmup_steps=4,
        cycle_ramp_steps=2,
        cycle_latent_warmup_steps=0,
        cycle_latent_ramp_steps=10,
        cycle_latent_weight=1.0,
        prior_weight=1.0,
        prior_ramp_steps=0,
    )
    weights = [trainer._objective.weights(number) for number in range(8)]
    text = [w.get("cycle_text", 0) for w in weights]
    assert text == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1])
    assert [w.get("prior", 0) for w in weights] == [0, 0, 0, 0, 1, 1, 1, 1]
    latent = [w.get("cycle_latent", 0) for w in weights]
    assert latent == pytest.approx([(number + 1) / 11 for number in range(8)])


# The module


def test_it_is_saved_and_loaded_as_the_host():
    host, batch = make_host(loss_type="cycle_vae"), make_batch()
    trainer = with_cycle(host)
    other = make_host(loss_type="cycle_vae", seed=1)
    assert list(trainer.state_dict()) == list(other.state_dict())
    assert [id(p) for p in trainer.parameters()] == [id(p) for p in host.parameters()]
    assert [n for n, _ in trainer.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert not hasattr(trainer, "module")
    trainer.load_state_dict(other.state_dict(), strict=True)
    assert_same(dict(host.state_dict()), dict(other.state_dict()))
    make_host().load_state_dict(trainer.state_dict(), strict=True)
    for name in ("tokenizer", "config", "latent_diffusion", "dtype", "text_params", "loss_type"):
        assert getattr(trainer, name) is getattr(host, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = trainer.no_such_thing
    assert not trainer.eval().host.training and not host.model.training
    assert trainer.train().host.training
    assert not with_cycle(make_host(loss_type="cycle_vae").eval()).training
    assert trainer(batch, step=3)[0].isfinite() and host.current_step == 3


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_copy_is_another_trainer(checkpoints):
    trainer, batch = cycle(cycle_checkpoint_passes=checkpoints), make_batch()
    other = copy.deepcopy(trainer)
    assert not set(other.parameters()) & set(trainer.parameters())
    assert set(other.parameters()) == set(other.host.parameters())
    expected, _ = step(trainer, batch)
    trainer.zero_grad()
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.zero_()
    loss, _ = step(other, batch)
    assert torch.equal(loss, expected)
    assert all(p.grad is None for p in trainer.parameters())
    assert any(p.grad.any() for p in other.parameters())


def test_a_step_after_one_of_another_mode_trains_everything():
    trainer, batch = cycle(), make_batch()
    trainer.host.loss_type = "l2t"
    trainer.host(batch)[0].backward()
    assert not all(p.requires_grad for p in trainer.parameters())
    trainer.zero_grad()
    step(trainer, batch)
    assert all(p.requires_grad for p in trainer.parameters())
    assert all(p.grad.any() for p in trainer.model.latent_head.parameters())
    before = {name: grad.clone() for name, grad in gradients(trainer).items()}
    step(trainer, batch)
    for name, grad in gradients(trainer).items():
        torch.testing.assert_close(grad, 2 * before[name], msg=name)


# Metrics


METRICS = {
    *("loss", "text_loss", "text_accuracy", "latent_loss", "cycle_text_loss", "cycle_latent_loss"),
    *("cycle_text_weight", "cycle_latent_weight", "cycle_weight", "prior_loss"),
    *("latent_norm", "latent_pred_norm", "latent_pred_mean", "latent_pred_variance"),
    "non_finite_terms",
}


def test_weights_that_may_move_are_metrics():
    options = {"prior_weight": 0.1, "unconditional_loss_weight": 1.0, "cycle_non_finite": None}
    unconditional = {"unconditional_text_loss", "unconditional_latent_loss"}
    expected = (METRICS | unconditional) - {"non_finite_terms"}
    for more in ({}, {"prior_ramp_steps": 3}):
        trainer = cycle(**options, **more)
        for _, metrics in (step(trainer, make_batch()), trainer(make_batch())):
            assert set(metrics) == expected | ({"prior_weight"} if more else set())


def test_metrics_are_read_in_one_copy(monkeypatch):
    _, metrics = step(cycle(prior_weight=0.1), make_batch())
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
    assert set(metrics) == METRICS
    assert metrics["cycle_weight"] == metrics["cycle_text_weight"] + metrics["cycle_latent_weight"]
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t) or tolist(t))
    with HostSyncs("cpu") as syncs:
        found = dict(metrics.items())
    assert syncs.found == [] and len(reads) == 1
    assert all(type(value) is float for value in found.values())
    assert list(found) == list(metrics)
    assert found == {
        name: value.item() for name, value in zip(found, metrics.values(), strict=False)
    }


SYNC_FREE = {
    "default": {},
    "all": {
        "prior_weight": 0.1,
        "cycle_latent_sampling": "categorical",
        "latent_t_mode": "random",
        "text_t_mode": "random",
        "cycle_stop_grad_latent": False,
        "cycle_fraction": 0.5,
        "unconditional_loss_weight": 1.0,
    },
    "checkpointed": {"cycle_checkpoint_passes": True},
}


@pytest.mark.parametrize("options", SYNC_FREE.values(), ids=SYNC_FREE)
def test_a_step_waits_for_no_value(options):
    host = make_host(loss_type="cycle_vae", quick=True, **options).to("meta")
    trainer = with_cycle(host)
    batch = {key: value.to("meta") for key, value in make_batch().items()}
    with HostSyncs() as syncs:
        for number in range(2):
            loss, metrics = trainer(batch, step=number)
            loss.backward()
    assert syncs.found == []
    assert all(value.is_meta for value in metrics.values())
    assert all(p.grad is not None for p in trainer.parameters())


# Rows that lack a part


def collate(items):
    """As the host's: three keys, and a latent [1, d] of each item."""
    return {
        "input_ids": torch.stack([item["input_ids"] for item in items]),
        "attention_mask": torch.stack([item["attention_mask"] for item in items]),
        "latent": torch.cat([item["latent"] for item in items]),
    }


def test_marks_reach_the_step_through_the_hosts_collate():
    batch = make_batch(4)
    items = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    items = [{**item, "latent": item["latent"][None], "token_file": "x"} for item in items]
    marked = Marked(items, has_text=[True, True, False, True], has_latent=[True, False, True, True])
    assert "has_text" not in collate([marked[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(marked, 4, collate_fn=collate_marks(collate))
    (loaded,) = loader
    assert loaded["has_text"].tolist() == marked.marks["has_text"]
    assert loaded["has_latent"].tolist() == marked.marks["has_latent"]
    missing = {**batch, "latent": batch["latent"].clone()}
    missing["latent"][1] = torch.nan  # a row without its latent, found by itself
    missing["has_text"] = loaded["has_text"]
    values = [step(cycle(), given)[1] for given in (loaded, missing)]
    for name in values[0]:
        torch.testing.assert_close(values[0][name], values[1][name])
    all_there = step(cycle(), collate([marked[i] for i in range(4)]))[1]
    assert values[0]["text_loss"] != all_there["text_loss"]


def test_marks_of_another_length():
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"`has_text` must have 2 entries, got {number}"):
            Marked([{}, {}], has_text=[True] * number)


def test_a_part_without_marks_is_there():
    assert Marked([{}], has_text=[False])[0] == {"has_text": False, "has_latent": True}


def test_a_wrapped_trainer_is_not_wrapped_again():
    with pytest.raises(TypeError, match="got CycleTrainer of an earlier call"):
        with_cycle(cycle())


def test_low_times_need_the_latent_shown_in_every_bridge():
    low = {"latent_t_mode": "random", "cycle_latent_t_min": 0.1, "cycle_latent_t_max": 0.9}
    shown = {"cycle_show_latent": True, "cycle_text_weight": 0.0}
    for options in (
        {},
        {"cycle_show_latent": True},  # the text cycle starts from noise still
        {**shown, "prior_weight": 1.0},  # and so does the latent of a prior
    ):
        with pytest.raises(ValueError, match="bridges start from pure noise"):
            cycle(**low, **options)
    cycle(**low, **shown)
