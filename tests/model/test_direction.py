"""Networks that count from noise to data: beside their twins they are the same everywhere."""

import copy

import pytest
import torch
from torch import nn

import cyclevae as cv
from cyclevae.diagnostics import cycle_report
from cyclevae.testing import check_denoiser, toy_batch, toy_denoiser
from cyclevae.testing.toy import ToyNetwork

TEXT = toy_denoiser()[1]
BATCH = toy_batch(seed=0)
PAIRS = BATCH.tokens, BATCH.latents, BATCH.attention_mask


class Forwards(nn.Module):
    """Clean at 0."""

    sign = 1.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = ToyNetwork(vocab_size=7, latent_dim=4)

    def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
        logits, velocity = self.inner(
            tokens,
            latents,
            text_time=text_time,
            latent_time=self.turned(latent_time),
            attention_mask=attention_mask,
        )
        return logits, self.sign * velocity

    def turned(self, time):
        return time


class Backwards(Forwards):
    """Clean at 1, with a velocity to the data."""

    sign = -1.0

    def turned(self, time):
        return 1 - time


def process(prediction="velocity"):
    return cv.LatentProcess("flow", prediction, max_gain=1e6, shape=(4,))


def seeded():
    return torch.Generator().manual_seed(0)


def step(denoiser, teacher, both):
    terms = [
        cv.Text(),
        cv.Latent(time=cv.TimePolicy("uniform", low=0.1)),
        cv.Unconditional(),
        cv.CycleText(bridge=cv.LatentBridge(steps=2)),
        cv.CycleLatent(),
        cv.Prior("learned", time=0.9),
        cv.Prior("ddvi", name="wake"),
        cv.Sleep(),
    ]
    objective = cv.CycleObjective(TEXT, process(), terms)
    module = cv.StepModule(denoiser, objective, teacher)
    return module(BATCH, step=0, generator=seeded()).loss


def report(denoiser, teacher, both):
    found = cycle_report(denoiser, toy_batch(seed=0, rows=8), **both)
    return torch.tensor([found.latent_loss, found.latent_error, found.latent.difference])


RUNS = {
    "l2t": lambda d, t, both: cv.l2t(d, BATCH.latents, BATCH.attention_mask, text_process=TEXT),
    "t2l": lambda d, t, both: cv.t2l_loss(d, *PAIRS, **both, time=0.4, generator=seeded()),
    "joint": lambda d, t, both: sum(cv.unconditional_loss(d, *PAIRS, **both, generator=seeded())),
    "bridge": lambda d, t, both: cv.encode_text(
        d,
        *BATCH[:2],
        **both,
        bridge=cv.LatentBridge(steps=3),
        policy=cv.GradientPolicy("full"),
        generator=seeded(),
    ),
    "prior": lambda d, t, both: cv.learned_prior(
        t.denoiser, BATCH.latents.clone().requires_grad_(), PAIRS[2], **both, generator=seeded()
    ),
    "wake": lambda d, t, both: cv.ddvi_wake_kl(
        d, t.denoiser, *BATCH[:2], BATCH.latents, **both, generator=seeded()
    ),
    "step": step,
    "report": report,
}


def outcome(run, denoiser):
    """What comes out, and the gradient of the parameters."""
    network = denoiser.module
    teacher = cv.Teacher(network)
    with torch.no_grad():
        for parameter in teacher.network.parameters():
            parameter.add_(0.1)
    value = run(denoiser, teacher, {"text_process": TEXT, "latent_process": process()})
    if not value.requires_grad:
        return value, []
    slopes = torch.autograd.grad(value.sum(), list(network.parameters()), allow_unused=True)
    return value, [slope for slope in slopes if slope is not None]


@pytest.mark.parametrize("name", RUNS)
def test_a_network_that_counts_to_the_data_is_its_twin(name):
    expected = outcome(RUNS[name], cv.as_denoiser(Forwards()))
    got = outcome(RUNS[name], cv.as_denoiser(Backwards(), clean_at=1))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_it_may_say_so_itself():
    network = Backwards()
    network.clean_at = 1  # which a class may have
    got, expected = (outcome(RUNS["t2l"], cv.as_denoiser(n)) for n in (network, Forwards()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_it_passes_the_dry_run():
    check_denoiser(cv.as_denoiser(Backwards(), clean_at=1), TEXT, process())


def test_other_predictions_are_left_as_they_are():
    class Seen(nn.Module):
        def forward(self, tokens, latents, *, text_time, latent_time, attention_mask):
            return None, latents * latent_time[:, None]

    tokens, latents, mask = PAIRS
    time = torch.tensor([0.0, 0.25, 1.0])
    state = {"text_time": time, "latent_time": time, "attention_mask": mask}
    denoiser = cv.as_denoiser(Seen(), clean_at=1, predicts="x0")
    out = denoiser.denoise(tokens, latents, **state).latent_prediction
    torch.testing.assert_close(out, latents * (1 - time)[:, None])
    for again in (
        denoiser.with_network(denoiser.module),
        cv.as_denoiser(copy.deepcopy(denoiser.module)),
        cv.as_denoiser(torch.optim.swa_utils.AveragedModel(denoiser.module)),
        cv.Teacher(denoiser.module).denoiser,
    ):
        assert (again.clean_at, again.predicts) == (1, "x0")
        assert torch.equal(again.denoise(tokens, latents, **state).latent_prediction, out)


def test_nothing_is_noted_where_nothing_is_said():
    network = Forwards()
    denoiser = cv.as_denoiser(network).with_network(network)
    assert (denoiser.clean_at, denoiser.predicts) == (0, None)
    assert not {"clean_at", "predicts"} & vars(network).keys()


def test_two_networks_count_alike():
    class Encoder(nn.Embedding):
        clean_at = 1

        def forward(self, tokens, latents, *, latent_time, **state):
            return super().forward(tokens).mean(dim=1) + latent_time[:, None]

    class Decoder(nn.Linear):
        def forward(self, tokens, latents, **state):
            return super().forward(latents)[:, None].expand(-1, tokens.shape[1], -1)

    encoder, decoder = Encoder(7, 4), Decoder(4, 7)
    with pytest.raises(ValueError, match=r"`encoder.clean_at` is 1 and `decoder.clean_at` 0"):
        cv.EncoderDecoder(encoder, decoder)
    decoder.clean_at = 1
    denoiser = cv.as_denoiser(cv.EncoderDecoder(encoder, decoder))
    assert (denoiser.clean_at, denoiser.predicts) == (1, "velocity")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clean_at": 2}, "`clean_at` must be one of 0, 1, got 2"),
        ({"predicts": "flow"}, "`predicts` must be one of 'epsilon', 'x0', 'v', 'velocity'"),
        ({"clean_at": 0}, "`clean_at` is 0, and of Told it is already 1: say it once"),
    ],
)
@pytest.mark.unhooked
def test_what_cannot_be_is_refused(options, words):
    class Told(Forwards):
        clean_at = 1

    with pytest.raises(ValueError, match=words):
        cv.as_denoiser(Told(), **options)


@pytest.mark.parametrize("name", ["t2l", "joint", "prior", "step", "check"])
def test_a_process_of_another_prediction_is_refused_before_a_pass(name):
    class Never(Backwards):
        def forward(self, *args, **state):
            raise AssertionError("a pass ran")

    denoiser = cv.as_denoiser(Never(), clean_at=1)
    both = {"text_process": TEXT, "latent_process": process("x0")}
    with pytest.raises(ValueError, match=r"is 'x0', and .* predicts 'velocity'.*predicts='x0'"):
        if name == "check":
            check_denoiser(denoiser, **both)
        elif name == "step":
            cv.CycleObjective(**both)(denoiser, BATCH, step=0)
        else:
            RUNS[name](denoiser, cv.Teacher(denoiser.module), both)
