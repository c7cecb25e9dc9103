"""Text bridges under `torch.compile`: one graph, and the numbers of eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cyclevae as cv
from cyclevae.bridges.text import TextBridge
from cyclevae.testing import toy_batch, toy_denoiser

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def reversed_argmax(logits, attention_mask, *, text_process, generator):
    logits, mask = logits.flip(1), attention_mask.flip(1)
    return cv.argmax_text(logits, mask, text_process=text_process).flip(1)


BRIDGES = (
    "argmax",
    "categorical",
    "straight_through",
    "sampled_straight_through",
    "gumbel",
    TextBridge("soft", temperature=0.5),
    TextBridge("unmask", steps=3),
    TextBridge("rloo", samples=3),
    TextBridge("rloo", marginal_weight=0.1),
    reversed_argmax,
)
TEXTS = {
    "plain": cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0),
    "placed": cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, start_id=3, end_id=4),
    "predicted": cv.TextProcess(mask_id=2, vocab_size=7, pad_id=0, end_id=4, end="predicted"),
}


CASES = [(bridge, "plain") for bridge in BRIDGES] + [
    (bridge, text)
    for text in ("placed", "predicted")
    for bridge in ("categorical", "gumbel", TextBridge("unmask", steps=3))
]


@pytest.mark.parametrize(
    ("bridge", "text"), CASES, ids=lambda x: x if x in TEXTS else str(TextBridge.of(x))
)
def test_a_cycle_through_any_bridge_compiles_to_one_graph(bridge, text):
    denoiser, _, process = toy_denoiser(seed=0)
    batch, parameters = toy_batch(seed=0), list(denoiser.module.parameters())
    policy = cv.GradientPolicy("full" if TextBridge.of(bridge).has_gradient else "detach")

    def cycle(latents, mask):
        return cv.cycle_latent_loss(
            denoiser,
            latents,
            mask,
            text_process=TEXTS[text],
            latent_process=process,
            bridge=bridge,
            policy=policy,
        )

    counter = CompileCounterWithBackend("aot_eager")
    fast, found = torch.compile(cycle, fullgraph=True, backend=counter), []
    for seed in range(2):
        for function in (fast, cycle):
            torch.manual_seed(seed)
            loss = function(batch.latents, batch.attention_mask)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            found.append([loss.detach(), *gradients])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert counter.frame_count == 1


def test_the_straight_through_bridge_compiles_by_itself():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    weight = torch.randn(2, 3, 7)

    def bridge(logits, mask):
        return cv.pseudo_text(logits, mask, text_process=TEXTS["plain"], bridge="straight_through")

    fast = torch.compile(bridge, fullgraph=True, backend="aot_eager")
    texts = [function(logits, mask) for function in (fast, bridge)]
    assert torch.equal(*texts)
    first, second = (torch.autograd.grad((text * weight).sum(), logits)[0] for text in texts)
    torch.testing.assert_close(first, second)
