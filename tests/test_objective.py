"""One step: which passes run, what they weigh, what is reported, and that it learns."""

import json
import math
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import cyclevae as cv
from cyclevae.testing import ToyNetwork, assert_frozen, assert_learns, toy_batch, toy_denoiser
from recipes import every_term

PAIRS_ONLY = {"cycle_text_weight": 0.0, "cycle_latent_weight": 0.0, "unconditional_weight": 0.0}


ISOLATED = cv.GradientPolicy("full", freeze_bridge=("shared.*",))


class Recorder:
    """A denoiser that keeps what it was asked."""

    def __init__(self, denoiser):
        self.inner, self.module, self.calls = denoiser, denoiser.module, []

    def denoise(self, tokens, latents, **state):
        self.calls.append((tokens, latents, state))
        return self.inner.denoise(tokens, latents, **state)


@pytest.fixture
def toy():
    return toy_denoiser(seed=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 5),
        ({"unconditional_weight": 0.0}, 4),
        ({"unconditional_weight": 0.0, "cycle_text_weight": 0.0}, 3),
        ({"unconditional_weight": 0.0, "cycle_latent_weight": 0.0}, 3),
        (PAIRS_ONLY, 2),
        (PAIRS_ONLY | {"prior_weight": 1.0}, 2),
        (PAIRS_ONLY | {"text_weight": 0.0}, 1),
        (PAIRS_ONLY | {"text_weight": 0.0, "latent_weight": 0.0, "prior_weight": 1.0}, 1),
        ({"unconditional_weight": 0.0, "base_latent_time": None}, 5),
        ({"text_weight": 0.0, "latent_weight": 0.0}, 5),
        (PAIRS_ONLY | {"cycle_text_weight": cv.ramp(1.0, 3)}, 2),
        ({"join_passes": True}, 4),
        (PAIRS_ONLY | {"join_passes": True}, 1),
        (PAIRS_ONLY | {"join_passes": True, "text_weight": 0.0}, 1),
        (PAIRS_ONLY | {"join_passes": True, "base_latent_time": None}, 2),
        (PAIRS_ONLY | {"join_passes": True, "base_text_time": 0.5}, 2),
        ({"join_passes": True, "text_policy": ISOLATED}, 6),
        ({"join_passes": True, "latent_policy": ISOLATED, "text_bridge": "soft"}, 6),
    ],
)
def test_a_term_of_weight_zero_costs_no_pass(toy, options, passes):
    denoiser, text, latent = toy
    recorder = Recorder(denoiser)
    objective = every_term(text, latent, **options)
    objective(recorder, toy_batch(), step=0)
    assert len(recorder.calls) == objective.passes(0) == passes


@pytest.mark.parametrize("lengths", [1, 5, 9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        PAIRS_ONLY,
        {"cycle_latent_weight": 0.0, "prior_weight": 1.0, "cycle_fraction": 0.5},
        {"cycle_text_weight": 0.0, "contrastive_weight": 1.0},
        {"text_policy": "full", "latent_policy": "full", "text_bridge": "gumbel"},
    ],
)
def test_a_joined_pass_computes_the_same(toy, monkeypatch, options, lengths):
    def noise(rows, *args, **kwargs):
        return torch.randn(rows, 4, generator=seeded(rows)).double()

    monkeypatch.setattr("cyclevae._step.draw_noise", noise)
    monkeypatch.setattr("cyclevae.passes.draw_noise", noise)
    denoiser, text, latent = toy
    denoiser.module.double()
    batch = toy_batch(rows=4)
    batch = batch._replace(
        latents=batch.latents.double(),
        unpaired_latents=batch.unpaired_latents.double(),
        pseudo_text_mask=torch.ones(4, lengths, dtype=torch.bool),
    )
    found = []
    for join in (False, True):
        objective = every_term(
            text, latent, **{"unconditional_weight": 0.0, **options}, join_passes=join
        )
        output = objective(denoiser, batch, step=0, generator=seeded())
        grads = torch.autograd.grad(output.loss, list(denoiser.module.parameters()))
        found.append((output.metrics, grads))
    torch.testing.assert_close(*found)


def test_joined_terms_cannot_be_told_apart(toy):
    with pytest.raises(ValueError, match="use 'skip', or leave the passes apart"):
        every_term(*toy[1:], join_passes=True, non_finite="zero")


def test_the_pass_plan_does_not_depend_on_the_batch(toy):
    denoiser, text, latent = toy
    objective = every_term(text, latent)
    paired_only = toy_batch()._replace(
        unpaired_tokens=None, unpaired_attention_mask=None, unpaired_latents=None
    )
    for batch in (toy_batch(), paired_only):
        recorder = Recorder(denoiser)
        objective(recorder, batch, step=0)
        assert len(recorder.calls) == 5


def test_the_base_losses_are_those_of_a_plain_trainer(toy):
    denoiser, text, latent = toy
    batch = toy_batch()
    objective = every_term(text, latent, **PAIRS_ONLY)
    metrics = objective(denoiser, batch, step=0, generator=seeded()).metrics

    ones, zeros = torch.ones(3), torch.zeros(3)
    noise = torch.randn(3, 4, generator=seeded())
    masked = torch.where(batch.attention_mask, 2, 0)
    network, keep = denoiser.module, batch.attention_mask
    logits, _ = network(
        masked, batch.latents, text_time=ones, latent_time=zeros, attention_mask=keep
    )
    _, predicted = network(
        batch.tokens, noise, text_time=zeros, latent_time=ones, attention_mask=keep
    )
    torch.testing.assert_close(
        metrics["text_loss"], cross_entropy(logits[keep], batch.tokens[keep]).detach()
    )
    # at full noise v is minus the latent, up to alpha = 1.6e-5
    torch.testing.assert_close(
        metrics["latent_loss"], mse_loss(predicted, -batch.latents).detach(), atol=1e-4, rtol=1e-4
    )


def test_the_shared_passes_give_the_losses_of_the_functions(toy):
    denoiser, text, latent = toy
    batch = toy_batch()
    objective = every_term(text, latent, unconditional_weight=0.0)
    recorder = Recorder(denoiser)
    out = objective(recorder, batch, step=0, generator=seeded())
    (_, _, first), (y_hat, noise_2, _), (tokens, noise_1, state), (_, z_hat, _) = recorder.calls
    kept = {"text_process": text, "latent_process": latent}
    text_cycle = cv.cycle_text_loss(
        denoiser, tokens, state["attention_mask"], noise=noise_1, **kept
    )
    latents = torch.cat([batch.latents, batch.unpaired_latents])
    latent_cycle = cv.cycle_latent_loss(
        denoiser, latents, first["attention_mask"], noise=noise_2, **kept
    )
    torch.testing.assert_close(out.metrics["cycle_text_loss"], text_cycle.detach())
    torch.testing.assert_close(out.metrics["cycle_latent_loss"], latent_cycle.detach())
    weights = {"text": 1, "latent": 5, "cycle_text": 2, "cycle_latent": 10}
    total = sum(weight * out.metrics[f"{term}_loss"] for term, weight in weights.items())
    torch.testing.assert_close(out.loss.detach(), total)
    assert not z_hat.requires_grad and not y_hat.requires_grad


def test_weights_scale_terms_and_gradients(toy):
    denoiser, text, latent = toy
    gradients = []
    for weight in (1.0, 3.0):
        objective = every_term(
            text, latent, **PAIRS_ONLY | {"latent_weight": 0.0, "text_weight": weight}
        )
        loss = objective(denoiser, toy_batch(), step=0).loss
        gradients.append(torch.autograd.grad(loss, denoiser.module.text_head.weight)[0])
    torch.testing.assert_close(3 * gradients[0], gradients[1])


def test_a_ramp_switches_a_term_on_and_reports_its_weight(toy):
    denoiser, text, latent = toy
    objective = every_term(text, latent, cycle_text_weight=cv.ramp(2.0, 10, 9))
    before = objective(denoiser, toy_batch(), step=9).metrics
    assert "cycle_text_loss" not in before and "cycle_text_weight" not in before
    after = objective(denoiser, toy_batch(), step=14).metrics
    assert after["cycle_text_weight"].item() == pytest.approx(1.0)


def test_metrics_are_detached_scalars_and_absent_terms_are_absent(toy):
    denoiser, text, latent = toy
    metrics = every_term(text, latent)(denoiser, toy_batch(), step=0).metrics
    for name, value in metrics.items():
        assert isinstance(value, torch.Tensor) and value.ndim == 0 and not value.requires_grad, name
    assert {"text_loss", "latent_loss", "text_accuracy", "latent_pred_norm"} <= metrics.keys()
    latents = torch.cat([toy_batch().latents, toy_batch().unpaired_latents])
    torch.testing.assert_close(metrics["latent_norm"], latents.norm(dim=1).mean())
    only = every_term(text, latent, **PAIRS_ONLY)(denoiser, toy_batch(), step=0).metrics
    assert set(only) == {"loss", "text_loss", "latent_loss", "text_accuracy"}


@pytest.mark.parametrize(
    "options", [{}, {"base_latent_time": None}, {"text_bridge": "categorical"}]
)
def test_a_seed_repeats_a_step_and_leaves_the_global_state_alone(toy, options):
    denoiser, text, latent = toy
    objective = every_term(text, latent, prior_weight=1.0, **options)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    losses = [objective(denoiser, toy_batch(), step=0, generator=seeded(s)).loss for s in (7, 7, 8)]
    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[1] != losses[2]


def test_counts_make_the_gradient_independent_of_accumulation(toy):
    """Two halves with the counts of the whole give the gradient of the whole."""
    denoiser, text, latent = toy
    # the text term alone: the others draw noise, which a split batch draws differently
    objective = every_term(text, latent, **PAIRS_ONLY | {"latent_weight": 0.0})
    network, whole = denoiser.module.double(), toy_batch(rows=5)
    whole = cv.Batch(whole.tokens, whole.attention_mask, whole.latents.double())
    halves = [cv.Batch(*(part[rows] for part in whole[:3])) for rows in (slice(3), slice(3, 5))]
    counts = objective.counts(whole)

    def gradient(batches):
        network.zero_grad()
        for batch in batches:
            objective(denoiser, batch, step=0, counts=counts).loss.backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    for split, joined in zip(gradient(halves), gradient([whole]), strict=True):
        torch.testing.assert_close(split, joined, rtol=1e-12, atol=1e-14)
    assert counts["text_loss"] == whole.attention_mask.sum()
    assert counts["latent_loss"] == whole.latents.numel()


def test_pseudo_text_lengths_are_those_of_the_batchs_own_texts(toy):
    denoiser, text, latent = toy
    recorder, batch = Recorder(denoiser), toy_batch()
    every_term(text, latent)(recorder, batch, step=0, generator=seeded())
    drawn = recorder.calls[0][2]["attention_mask"][3:]
    own = torch.cat([batch.attention_mask, batch.unpaired_attention_mask])
    assert all(any(torch.equal(row, its) for its in own) for row in drawn)


def test_pseudo_texts_may_end_at_a_predicted_token(toy):
    denoiser, _, latent = toy
    text = cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=6, end="predicted")
    with torch.no_grad():
        denoiser.module.text_head.bias[6] = 2.0  # likely, not certain
    recorder = Recorder(denoiser)
    objective = every_term(text, latent, text_bridge="categorical")
    objective(recorder, toy_batch(rows=16), step=0, generator=seeded())
    y_hat, _, state = recorder.calls[1]
    ends = y_hat == 6
    assert ends.any() and not ends.all()
    assert torch.equal(ends.sum(1), ends.any(1).long())  # once, and nothing but padding after it
    after = ends.cumsum(1).bool() & ~ends
    assert bool((y_hat[after] == 0).all()) and not state["attention_mask"][after].any()


def test_given_pseudo_text_masks_are_used(toy):
    denoiser, text, latent = toy
    recorder = Recorder(denoiser)
    mask = torch.arange(8) < torch.tensor([[8], [7], [6]])
    batch = toy_batch()._replace(pseudo_text_mask=mask)
    out = every_term(text, latent)(recorder, batch, step=0)
    assert torch.equal(recorder.calls[0][2]["attention_mask"][3:], mask)
    assert math.isfinite(out.loss.item())


def test_unconditional_rows_without_a_partner_know_nothing_of_it(toy):
    denoiser, text, latent = toy
    recorder = Recorder(denoiser)
    objective = every_term(
        text, latent, **PAIRS_ONLY | {"unconditional_weight": 1.0, "text_weight": 0.0,
        "latent_weight": 0.0},
    )  # fmt: skip
    batch = toy_batch()
    objective(recorder, batch, step=0, generator=seeded())
    ((tokens, z_t, state),) = recorder.calls
    assert torch.equal(state["latent_time"][3:6], torch.ones(3))  # texts alone: pure noise
    assert torch.equal(state["text_time"][6:], torch.ones(3))  # latents alone: fully masked
    assert bool((tokens[6:][state["attention_mask"][6:]] == text.mask_id).all())
    moved = batch._replace(latents=batch.latents + 1, unpaired_latents=batch.unpaired_latents + 1)
    other = Recorder(denoiser)
    objective(other, moved, step=0, generator=seeded())
    assert torch.equal(z_t[3:6], other.calls[0][1][3:6])


def two_towers():
    torch.manual_seed(0)
    towers = cv.EncoderDecoder(OneHead("latent_prediction"), OneHead("logits"))
    return cv.as_denoiser(towers)


class OneHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.network = head, ToyNetwork(7, 4)

    def forward(self, tokens, latents, **state):
        return getattr(self.network(tokens, latents, **state), self.head)


@pytest.mark.parametrize(
    ("term", "policy", "learns", "frozen"),
    [
        ("cycle_text", cv.GradientPolicy(), "decoder", "encoder"),
        ("cycle_text", cv.GradientPolicy("full"), "encoder", None),
        ("cycle_text", cv.GradientPolicy("full", ("decoder.*",)), "encoder", "decoder"),
        ("cycle_text", cv.GradientPolicy("full", (), ("encoder.*",)), "decoder", "encoder"),
        ("cycle_latent", cv.GradientPolicy(), "encoder", "decoder"),
        ("prior", cv.GradientPolicy(), "encoder", "decoder"),
    ],
)
def test_who_learns_from_which_term(term, policy, learns, frozen):
    denoiser = two_towers()
    _, text, latent = toy_denoiser()
    terms = ("text", "latent", "unconditional", "cycle_text", "cycle_latent", "prior")
    weights = {f"{t}_weight": 0.0 for t in terms}
    objective = every_term(text, latent, **weights | {f"{term}_weight": 1.0}, text_policy=policy)
    loss = objective(denoiser, toy_batch(), step=0).loss
    used = [
        (name, p)
        for name, p in denoiser.module.named_parameters()
        if not name.startswith(("encoder.network.text_head", "decoder.network.latent_head"))
    ]
    towers = {t: [item for item in used if item[0].startswith(t)] for t in ("encoder", "decoder")}
    assert_learns(loss, towers[learns])
    if frozen:
        assert_frozen(loss, towers[frozen])


def test_an_epsilon_bridge_needs_a_capped_time_and_then_a_base_pass_of_its_own(toy):
    denoiser, text, _ = toy
    epsilon = cv.LatentProcess(prediction="epsilon", shape=(4,))
    with pytest.raises(ValueError, match=r"(?s)gain of 6\.41.*predict `v`.*capped time.*DDIM"):
        every_term(text, epsilon)
    every_term(text, epsilon, **PAIRS_ONLY)(denoiser, toy_batch(), step=0)
    capped = every_term(text, epsilon, bridge_time=0.9, base_latent_time=None)
    recorder = Recorder(denoiser)
    capped(recorder, toy_batch(), step=0)
    times = [state["latent_time"] for *_, state in recorder.calls if not state["text_time"].any()]
    assert max(time.max() for time in times) <= 0.9


def test_a_frozen_pattern_is_resolved_before_its_term_switches_on(toy):
    denoiser, text, latent = toy
    recorder, generator = Recorder(denoiser), seeded()
    state = generator.get_state()
    objective = every_term(
        text,
        latent,
        cycle_text_weight=cv.ramp(2.0, 100),
        text_policy=cv.GradientPolicy(freeze=("wrd.*",)),
    )
    with pytest.raises(ValueError, match=r"'wrd\.\*' of freeze\(\) matches no parameter"):
        objective(recorder, toy_batch(), step=0, generator=generator)
    assert not recorder.calls and torch.equal(state, generator.get_state())


@pytest.mark.parametrize("freeze_bridge", [(), ("word.*",)])
@pytest.mark.parametrize("base_latent_time", [1.0, None])
def test_the_announced_passes_are_those_that_run(toy, freeze_bridge, base_latent_time):
    denoiser, text, latent = toy
    policy = cv.GradientPolicy("full", (), freeze_bridge)
    terms = ("text", "latent", "unconditional", "cycle_text", "cycle_latent", "prior")
    for chosen in range(1, 2 ** len(terms)):
        weights = {f"{t}_weight": float(chosen >> i & 1) for i, t in enumerate(terms)}
        objective = every_term(
            text, latent, **weights, text_policy=policy, base_latent_time=base_latent_time
        )
        recorder = Recorder(denoiser)
        objective(recorder, toy_batch(), step=0)
        assert len(recorder.calls) == objective.passes(0), weights


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"tokens": None}, "pairs need both"),
        ({"tokens": None, "attention_mask": None, "latents": None}, "at least one pair"),
        ({"unpaired_attention_mask": None}, "padding must never count"),
        ({"unpaired_tokens": None}, "came without `batch.unpaired_tokens`"),
        ({"unpaired_latents": torch.zeros(3, 5)}, r"shape \[b, 4\]"),
        ({"latents": torch.zeros(3, 4, device="meta")}, "is on meta and `batch.tokens` on cpu"),
    ],
)
def test_an_incomplete_batch_is_refused_before_any_pass(toy, part, message):
    denoiser, text, latent = toy
    recorder = Recorder(denoiser)
    with pytest.raises(ValueError, match=message):
        every_term(text, latent)(recorder, toy_batch()._replace(**part), step=0)
    assert not recorder.calls


@pytest.mark.unhooked
def test_options_are_refused_by_name(toy):
    _, text, latent = toy
    with pytest.raises(ValueError, match=r"`prior` is 'mdd'; did you mean 'mmd'\?"):
        every_term(text, latent, prior="mdd")
    with pytest.raises(ValueError, match="has no gradient"):
        every_term(text, latent, latent_policy=cv.GradientPolicy("full"))
    with pytest.raises(ValueError, match="`bridge_time` must lie in"):
        every_term(text, latent, bridge_time=1.5)


def test_unknown_counts_and_an_empty_plan_are_refused(toy):
    denoiser, text, latent = toy
    with pytest.raises(ValueError, match=r"unknown count 'text'; did you mean 'text_loss'\?"):
        every_term(text, latent)(denoiser, toy_batch(), step=0, counts={"text": 1})
    idle = every_term(text, latent, **PAIRS_ONLY | {"text_weight": 0, "latent_weight": 0})
    with pytest.raises(ValueError, match="nothing to train on"):
        idle(denoiser, toy_batch(), step=0)


def test_the_text_cycle_falls_over_50_steps():
    """A real, if tiny, transformer learns to read back what it encodes."""
    torch.manual_seed(0)
    _, text, latent = toy_denoiser()
    from_examples = cv.as_denoiser(TinyTransformer(7, 4))
    objective = every_term(text, latent)
    optimizer = torch.optim.AdamW(from_examples.module.parameters(), 1e-2)
    generator, curve = seeded(), []
    for step in range(50):
        output = objective(from_examples, toy_batch(rows=8), step=step, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        curve.append(output.metrics["cycle_text_loss"].item())
    assert sum(curve[-5:]) < 0.75 * sum(curve[:5])
    # four words are equally frequent: below log 4, the latent must tell which
    assert sum(curve[-5:]) / 5 < 0.95 * math.log(4)


class TinyTransformer(nn.Module):
    def __init__(self, vocab_size, latent_dim, width=16):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.place = nn.Parameter(torch.randn(16, width))
        self.latent_in, self.times = nn.Linear(latent_dim, width), nn.Linear(2, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True)
        self.text_head, self.latent_head = (
            nn.Linear(width, vocab_size),
            nn.Linear(width, latent_dim),
        )

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        latent = self.latent_in(latents) + self.times(torch.stack([text_time, latent_time], 1))
        text = self.word(tokens) + self.place[: tokens.shape[1]]
        hidden = self.block(
            torch.cat([latent[:, None], text], 1),
            src_key_padding_mask=nn.functional.pad(~attention_mask, (1, 0)),
        )
        return self.text_head(hidden[:, 1:]), self.latent_head(hidden[:, 0])


def test_step_module_registers_the_network_and_runs_a_step(toy):
    denoiser, text, latent = toy
    module = cv.StepModule(denoiser, every_term(text, latent))
    assert len(list(module.parameters())) == len(list(denoiser.module.parameters()))
    module(toy_batch(), step=0).loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(TypeError, match="make it by as_denoiser"):
        cv.StepModule(Recorder(denoiser), every_term(text, latent))


def test_a_configuration_survives_json(toy):
    _, text, _ = toy
    objective = every_term(
        text,
        cv.LatentProcess("linear", "x0", shape=(4,)),
        cycle_text_weight=cv.ramp(1.0, 10, 20),
        prior_weight=0.5,
        prior_options={"mean": torch.tensor([0.0, 1.0, 2.0, 3.0])},
        text_policy=cv.GradientPolicy("full", ("decoder.*",)),
    )
    config = json.loads(json.dumps(objective.to_config()))
    again = cv.CycleObjective.from_config(config)
    assert again.to_config() == config == objective.to_config()
    assert again.cycle_text_weight == cv.ramp(1.0, 10, 20)
    assert again.text_policy == objective.text_policy
    assert {f.name for f in fields(objective) if f.init} | {"version"} == config.keys()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cycle_txt_weight", 1.0, "unknown key 'cycle_txt_weight'.*'cycle_text_weight'"),
        ("latent_process", {"predicton": "v"}, "unknown key 'predicton' for LatentProcess.*'pred"),
        ("version", 9, "`version` must be 1, got 9"),
        ("text_process", {}, "incomplete configuration.*mask_id"),
    ],
)
def test_a_configuration_with_a_typo_is_refused(toy, key, value, message):
    _, text, latent = toy
    config = every_term(text, latent).to_config()
    with pytest.raises(ValueError, match=message):
        cv.CycleObjective.from_config(config | {key: value})


def test_a_function_of_ones_own_has_no_configuration(toy):
    _, text, latent = toy
    with pytest.raises(ValueError, match=r"`prior_weight` is .*a plain configuration cannot hold"):
        every_term(text, latent, prior_weight=lambda step: 1.0).to_config()


def test_a_number_is_refused_where_tensors_are_not_read(toy):
    denoiser, text, _ = toy
    epsilon = cv.LatentProcess(prediction="epsilon", shape=(4,))
    tokens, mask, _ = toy_batch()[:3]
    with cv.check_values(False):
        encoded = cv.t2l(
            denoiser, tokens, mask, text_process=text, latent_process=epsilon, start="noise"
        )
        with pytest.raises(ValueError, match="gain of"):
            encoded.z_hat(epsilon)


@pytest.mark.parametrize("name", ["has_text", "has_latent"])
@pytest.mark.unhooked
def test_rows_are_chosen_by_bool_of_their_number(toy, name):
    denoiser, text, latent = toy
    tokens, mask, latents = toy_batch()[:3]
    for bad in (torch.tensor([True]), torch.ones(3)):
        with pytest.raises(ValueError, match=rf"`{name}` must be bool \[3\]"):
            cv.unconditional_loss(
                denoiser, tokens, latents, mask, text_process=text, latent_process=latent,
                **{name: bad},
            )  # fmt: skip


def test_empty_unpaired_parts_count_nothing(toy):
    denoiser, text, latent = toy
    batch = toy_batch()
    empty = batch._replace(
        unpaired_tokens=batch.unpaired_tokens[:0],
        unpaired_attention_mask=batch.unpaired_attention_mask[:0],
        unpaired_latents=batch.unpaired_latents[:0],
    )
    objective = every_term(text, latent)
    none = cv.Batch(*batch[:3])
    losses = [objective(denoiser, b, step=0, generator=seeded()).loss for b in (empty, none)]
    assert losses[0] == losses[1]


def test_a_loss_above_its_cap_counts_as_the_cap_and_has_no_gradient():
    denoiser, text, latent = toy_denoiser(seed=0)
    free = every_term(text, latent)
    capped = every_term(text, latent, caps={"text": 0.5, "latent": 1e3})
    values, gradients = [], []
    for objective in (free, capped):
        generator = torch.Generator().manual_seed(0)
        output = objective(denoiser, toy_batch(), step=0, generator=generator)
        values.append(output.metrics)
        denoiser.module.zero_grad()
        output.loss.backward()
        gradients.append(denoiser.module.shared.weight.grad.clone())
    assert values[0]["text_loss"] > 0.5 and values[1]["text_loss"] == 0.5
    assert values[0]["latent_loss"] == values[1]["latent_loss"]
    torch.testing.assert_close(values[1]["loss"], values[0]["loss"] - values[0]["text_loss"] + 0.5)
    generator = torch.Generator().manual_seed(0)
    text_term = free.terms(denoiser, toy_batch(), step=0, generator=generator)["text"]
    (of_text,) = torch.autograd.grad(text_term, denoiser.module.shared.weight)
    torch.testing.assert_close(gradients[1], gradients[0] - of_text)
