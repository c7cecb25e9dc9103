"""The mathematics page: what it names exists, its formulas render, its derivations hold."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import cyclevae as cv
from cyclevae.model.denoiser import Denoised

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mathematics.md").read_text()
API = "".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md")))
PROSE = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
FORMULAS = re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", PROSE, flags=re.DOTALL)


def test_the_tests_it_names_are_in_their_files():
    rows = re.findall(r"^\|.*\| `([\w/]+\.py)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) > 30
    for file, names in rows:
        source = (ROOT / "tests" / file).read_text()
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"\ndef {name}(" in source, (file, name)


@pytest.mark.parametrize("section", re.split(r"^## ", PROSE, flags=re.MULTILINE)[2:-1])
def test_a_section_names_functions_and_sources(section):
    assert re.search(r"\]\(api/[\w-]+\.md#cyclevae\.", section)
    assert re.search(r"\]\(https://|[Dd]erived\s+here", section)


def test_the_functions_it_links_are_in_the_api_page():
    listed = re.findall(r"^::: (\S+)", API, flags=re.MULTILINE)
    linked = re.findall(r"\[`(\w+)`\]\(api/[\w-]+\.md#([\w.]+)\)", PROSE)
    assert len(linked) > 20
    for label, anchor in linked:
        assert anchor in listed
        assert anchor.endswith(f".{label}")


def test_no_loss_or_prior_is_left_out():
    names = re.findall(r"^::: cyclevae\.(\w+_(?:loss|prior|kl|weight|surrogate))$", API, re.M)
    assert len(names) >= 12
    assert not [name for name in names if f"`{name}`" not in PROSE]


def test_formulas_become_mathml_with_nothing_left_over():
    """As the site is built; a command that the converter does not know would stay as it is."""
    pytest.importorskip("l2m4m")
    from latex2mathml.converter import convert

    assert len(FORMULAS) > 100
    for display, inline in FORMULAS:
        found = convert(display or inline, display="block" if display else "inline")
        assert "\\" not in found and "&amp;" not in found, display or inline


def test_formulas_survive_other_renderers():
    """Markdown would take these characters of an inline formula for its own."""
    for _, inline in FORMULAS:
        assert not re.search(r"\\[{}!;#_\\]|\|", inline), inline
        assert inline == inline.strip()


def test_a_function_has_a_space_before_its_argument():
    hook = {}
    exec((ROOT / "docs" / "_build" / "mathml.py").read_text(), hook)
    space = '<mspace width="0.167em"></mspace>'
    assert hook["on_page_content"]("<mi>log</mi><mi>p</mi>") == f"<mi>log</mi>{space}<mi>p</mi>"
    for same in ('<mi>log</mi><mo stretchy="false">(</mo>', "<mi>l</mi><mi>p</mi>", "log p"):
        assert hook["on_page_content"](same) == same


# --- derivations that no other test checks ----------------------------------------------------

TEXT = cv.TextProcess(mask_id=1, vocab_size=4, pad_id=0)  # the words are 2 and 3
LATENT = cv.LatentProcess("continuous_cosine", prediction="v", shape=(1,))
MODEL = {"text_process": TEXT, "latent_process": LATENT}


class Pair:
    """A decoder of two words with logit `2 z - 1`; T2L says `mean`, moved by its own noise."""

    def __init__(self, mean, own_noise):
        self.mean, self.own_noise = mean, own_noise

    def denoise(self, tokens, latents, **state):
        words = torch.cat([2 * latents - 1, torch.zeros_like(latents)], dim=1)
        logits = F.pad(words, (2, 0), value=-1e4)[:, None].expand(-1, tokens.shape[1], -1)
        return Denoised(logits, -self.mean - self.own_noise * latents)  # v = -z at full noise


@pytest.mark.parametrize("own_noise", [0.0, 0.6])
@pytest.mark.parametrize(("mean", "s"), [(0.5, 0.8), (-0.7, 0.4), (0.0, 1.3)])
def test_the_noised_text_cycle_and_its_kl_bound_the_likelihood(mean, s, own_noise):
    rows, text = 200_000, [2, 3, 2]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    tokens = torch.tensor(text).expand(rows, -1)
    cycle = cv.cycle_text_loss(
        Pair(mean, own_noise),
        tokens,
        tokens > 0,
        noise=start,
        bridge=cv.LatentBridge(noise=s),
        generator=generator,
        reduction="nats",
        **MODEL,
    )
    z_hat = mean + own_noise * start
    bound = cycle + (z_hat.square() + s**2 - 1 - 2 * math.log(s)).mean() / 2

    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    log_word = {2: F.logsigmoid(2 * z - 1), 3: F.logsigmoid(1 - 2 * z)}
    log_joint = normal(0.0, 1.0).log_prob(z) + sum(log_word[word] for word in text)
    evidence = torch.trapezoid(log_joint.exp(), z).log()
    assert bound > -evidence
    if own_noise == 0:  # and what lies between is the divergence from the posterior
        q = normal(mean, s).log_prob(z)
        gap = torch.trapezoid(q.exp() * (q - log_joint + evidence), z)
        assert float(bound + evidence) == pytest.approx(float(gap), abs=0.02)


class Table:
    """A decoder that sees which words show, with a random row of logits for each pattern."""

    def __init__(self, positions):
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(4**positions, positions, 2, generator=generator).double()
        self.place = 4 ** torch.arange(positions)

    def denoise(self, tokens, latents, **state):
        words = self.logits[(tokens * self.place).sum(dim=1)]
        return Denoised(F.pad(words, (2, 0), value=-1e4), None)


def test_the_bound_is_the_mean_over_orders_of_writing():
    table, text = Table(3), torch.tensor([[2, 3, 3]])
    orders = list(itertools.permutations(range(3)))
    nats = []
    for order in orders:
        shown = torch.full_like(text, TEXT.mask_id)
        for place in order:
            log_p = table.denoise(shown, None).logits.log_softmax(dim=-1)
            nats.append(-log_p[0, place, text[0, place]])
            shown[0, place] = text[0, place]
    expected = torch.stack(nats).sum() / len(orders)

    rows = text.expand(200_000, -1)
    generator = torch.Generator().manual_seed(0)
    found = cv.text_marginal_loss(
        table, rows, rows > 0, generator=generator, reduction="none", **MODEL
    ).sum(dim=1)
    error = found.std() / len(rows) ** 0.5
    assert abs(found.mean() - expected) < 4 * error < 0.06


def test_the_speed_of_gamma_is_the_likelihood_weighting():
    """`gamma' = g^2 / sigma^2`, for `g^2 = 0.1 + 19.9 t` of the usual variance preserving SDE."""

    def schedule(t):
        alpha2 = (-(0.1 * t + 19.9 * t.square() / 2)).exp()
        return alpha2.sqrt(), (1 - alpha2).sqrt()

    process = cv.LatentProcess(schedule)
    time = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64, requires_grad=True)
    (speed,) = torch.autograd.grad(-process.snr(time).log().sum(), time)
    sigma = process.alpha_sigma(time)[1]
    torch.testing.assert_close(speed, (0.1 + 19.9 * time) / sigma.square())
