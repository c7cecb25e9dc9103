"""The whole training step, against the one a user would write and against its bare passes."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from full import TERMS, WEIGHTS, changed
from memory import PeakBytes, peak_bytes
from mmdit_model import MMDiTDenoiser
from plain import plain_step
from setting import Found, Setting
from timing import Call
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import cyclevae as cv

MASK_ID = 1


def read(logits: Any) -> Tensor:
    """The logits as a tensor, also where a head leaves them unread."""
    return getattr(logits, "read", lambda: logits)()


def _as_it_is(denoiser: cv.Denoiser) -> cv.Denoiser:
    return denoiser


TARGETS: dict[tuple[int, torch.dtype], tuple[float, float | None]] = {  # time, peak bytes
    (256, torch.float32): (0.60, 0.45),
    (256, torch.bfloat16): (0.50, 0.35),
    (512, torch.float32): (0.70, None),  # wide blocks and their tables weigh more than logits
    (512, torch.bfloat16): (0.70, None),
    (1024, torch.float32): (0.85, None),
    (1024, torch.bfloat16): (0.85, None),
}
LONG = {"bridge": cv.LatentBridge(steps=4)}
HALF = changed(cycle_text={"fraction": 0.5}, cycle_latent={"fraction": 0.5})
CHANGES: dict[str, tuple[dict[str, Any], Callable[[cv.Denoiser], cv.Denoiser]]] = {
    "no cycles": ({"terms": [t for t in TERMS if not t.name.startswith("cycle")]}, _as_it_is),
    "cycles with fraction=0.5": ({"terms": HALF}, _as_it_is),
    "checkpoint_passes": ({}, cv.checkpoint_passes),
    "checkpoint_passes, cycles with fraction=0.5": ({"terms": HALF}, cv.checkpoint_passes),
    "join_passes=True": ({"join_passes": True}, _as_it_is),
    "Unconditional()": ({"terms": [*TERMS, cv.Unconditional()]}, _as_it_is),
    "CycleText(policy='full')": ({"terms": changed(cycle_text={"policy": "full"})}, _as_it_is),
    "a latent bridge of 4 steps": ({"terms": changed(cycle_text=LONG, prior=LONG)}, _as_it_is),
    "CycleLatent(bridge='gumbel', policy='full')": (
        {"terms": changed(cycle_latent={"bridge": "gumbel", "policy": "full"})}, _as_it_is
    ),
}  # fmt: skip


class Network(MMDiTDenoiser):
    """In bf16 too: its floating-point inputs take the dtype of its weights."""

    def forward(self, tokens: Tensor, latents: Tensor, **state: Any) -> cv.Denoised:
        state |= {
            name: state[name].to(self.position.dtype) for name in ("text_time", "latent_time")
        }
        return super().forward(tokens, latents.to(self.position.dtype), **state)


class Case:
    """A network, a batch of pairs and an objective; each step is a forward and a backward."""

    def __init__(
        self,
        device: torch.device,
        *,
        rows: int,
        length: int,
        width: int,
        depth: int = 2,
        vocab_size: int = 30522,
        latent_dim: int = 384,
        dtype: torch.dtype = torch.float32,
        terms: Sequence[cv.Term] = TERMS,
        join_passes: bool = False,
    ) -> None:
        torch.manual_seed(0)
        random.seed(0)  # mmdit draws by it which of its streams a block begins with
        network = Network(
            vocab_size,
            latent_dim,
            length=length,
            width=width,
            depth=depth,
            heads=max(4, width // 64),
        )
        self.network = network.to(device, dtype)
        lengths = torch.randint(length // 2, length + 1, (rows, 1), device=device)
        self.mask = torch.arange(length, device=device) < lengths
        self.tokens = torch.randint(3, vocab_size, (rows, length), device=device) * self.mask
        self.latents = torch.randn(rows, latent_dim, device=device).to(dtype)
        self.batch = cv.Batch(self.tokens, self.mask, self.latents)
        self.objective = cv.CycleObjective(
            cv.TextProcess(MASK_ID, vocab_size, pad_id=0),
            cv.LatentProcess("continuous_cosine"),
            terms,
            join_passes=join_passes,
        )
        self.name = (
            f"{depth} x {width}, {rows} x {length} tokens, {str(dtype).removeprefix('torch.')}"
        )

    def ours(self, step: Callable[..., cv.StepOutput] | None = None) -> None:
        self.network.zero_grad(set_to_none=False)  # as all but the first step
        if step is None:
            step = partial(self.objective, cv.as_denoiser(self.network))
        output = step(self.batch, step=0)
        output.loss.backward()
        for value in output.metrics.values():
            value.item()

    def plain(self, network: nn.Module | None = None) -> None:
        self.network.zero_grad(set_to_none=False)  # as all but the first step
        loss, _ = plain_step(
            self.network if network is None else network,
            self.tokens,
            self.mask,
            self.latents,
            MASK_ID,
            WEIGHTS,
        )
        loss.backward()

    def passes(
        self, read: Callable[[Any], Tensor] = read, *, encoders: int = 2, share: float = 1.0
    ) -> list[Tensor]:
        """The passes of a step, each asked for what is read of it.

        A decoder's, some of the encoder's, and a decoder's on a share of the rows.
        """
        masked = self.tokens.masked_fill(self.mask, MASK_ID)
        ones = self.latents.new_ones(len(self.latents))

        def run(text: Tensor, rows: int, text_time: float, need: str) -> cv.Denoised:
            times = text_time * ones[:rows]
            return self.network(
                text[:rows], self.latents[:rows], text_time=times, latent_time=1 - times,
                attention_mask=self.mask[:rows], need=need,
            )  # fmt: skip

        b, some = len(ones), round(share * len(ones))
        first = read(run(masked, b, 1.0, "logits").logits)
        z_hats = [run(self.tokens, b, 0.0, "latents").latent_prediction for _ in range(encoders)]
        return [first, *z_hats, read(run(masked, some, 1.0, "logits").logits)]

    def bare(self, read: Callable[[Any], Tensor] = read, **options: Any) -> Call:
        """These passes, and their backward from gradients that are there already."""
        with torch.no_grad():
            gradients = [torch.randn_like(output) for output in self.passes(read, **options)]

        def call() -> None:
            self.network.zero_grad(set_to_none=False)  # as all but the first step
            torch.autograd.backward(self.passes(read, **options), gradients)

        return call

    def headless(self) -> Call:
        """The same without text heads, whose logits need not be alive at the peak."""
        return self.bare(lambda logits: logits.hidden)

    def products(self, **options: Any) -> Call:
        """The same with the heads at the positions that count alone, and no loss of logits."""

        def read(logits: Any) -> Tensor:
            counted = logits.hidden[self.mask[: len(logits)]]
            return F.linear(counted, logits.weight, logits.bias)

        return self.bare(read, **options)

    def joint(self) -> Call:
        """One pass of both directions, and its backward from gradients that are there already."""
        masked = self.tokens.masked_fill(self.mask, MASK_ID)
        ones = self.latents.new_ones(len(self.latents))
        times = torch.cat([ones, ones - 1])
        inputs = torch.cat([masked, self.tokens]), torch.cat([self.latents, self.latents])
        state = {"text_time": times, "latent_time": 1 - times}
        state["attention_mask"] = torch.cat([self.mask, self.mask])

        def run() -> list[Tensor]:
            output = self.network(*inputs, **state, need="both")
            return [read(output.logits), output.latent_prediction]

        with torch.no_grad():
            gradients = [torch.randn_like(output) for output in run()]

        def call() -> None:
            self.network.zero_grad(set_to_none=False)  # as all but the first step
            torch.autograd.backward(run(), gradients)

        return call

    def l2t(self) -> None:
        """A step of the decoder alone, as any trainer has it."""
        self.network.zero_grad(set_to_none=False)  # as all but the first step
        ones = self.latents.new_ones(len(self.latents))
        output = self.network(
            self.tokens.masked_fill(self.mask, MASK_ID),
            self.latents,
            text_time=ones,
            latent_time=torch.zeros_like(ones),
            attention_mask=self.mask,
        )
        targets = self.tokens.masked_fill(~self.mask, -100)
        logits = read(output.logits).float()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()


def step(setting: Setting) -> Found:
    """The full objective, eager."""
    sizes = [{"rows": 4, "length": 128, "width": width} for width in (256, 512)]
    sizes += [{"rows": 2, "length": 128, "width": 1024}]
    if setting.device.type == "cuda":
        sizes += [{"rows": 16, "length": 128, "width": 1024, "depth": 24}]
    if setting.quick:
        sizes = [{"rows": 2, "length": 8, "width": 32, "vocab_size": 100, "latent_dim": 8}]
    for size in sizes:
        for dtype in setting.dtypes(size["width"], 512):
            try:
                case = Case(setting.device, dtype=dtype, **size)
                yield from _eager(setting, case, host_like=size == sizes[-1])
            except torch.OutOfMemoryError:
                yield f"step, {size}, {dtype}: out of memory"


def _eager(setting: Setting, case: Case, *, host_like: bool) -> Found:
    width, dtype = case.network.text_head.weight.shape[1], case.latents.dtype
    most, peak = TARGETS.get((width, dtype), (None, None))
    calls = case.ours, case.plain
    given = "step", case.name, "plain step"
    half = dtype == torch.bfloat16
    rounds = 2 if half else 5  # CPUs without units for bf16 take minutes a round
    yield setting.time(*given, *calls, target=most, limit=case.products, rounds=rounds)
    yield setting.peak(*given, *calls, target=peak, limit=case.headless)
    if not half:  # where they are the same
        yield setting.row("step", case.name, "flops", "plain step", *map(_flops, calls))
        if setting.device.type == "cpu":
            yield from _why(case)
    if host_like:
        bare = case.bare()
        given = "step", case.name, "bare passes"
        yield setting.time(*given, case.ours, bare, target=1.03, limit=case.products, rounds=rounds)
        if not half:
            yield setting.row(*given[:2], "flops", given[2], _flops(case.ours), _flops(bare))
        yield setting.time("step", case.name, "one L2T step", case.ours, case.l2t)


def _why(case: Case) -> Found:
    """What time and bytes go to: notes, for ratios that fall short."""
    table = case.network.text_head.weight
    v, width = table.shape
    if width == case.tokens.numel():  # as large as logits
        return
    for name, call in (("ours", case.ours), ("plain step", case.plain)):
        with profile() as profiled:
            call()
        times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        products = sum(times.get(f"aten::{name}", 0) for name in ("mm", "addmm", "bmm", "baddbmm"))
        with PeakBytes(itemise=True) as held:
            call()
        row = v * table.element_size()
        weights = sum(size for size in held.sizes if size == width * row)
        logits = sum(size for size in held.sizes if size % row == 0) - weights
        yield (
            f"step, {case.name}, {name}: {products / sum(times.values()):.0%} of the time are "
            f"matrix products; of {held.peak / 2**20:.0f} MiB at the peak, logits and their "
            f"gradient are {logits / 2**20:.0f}, gradients of the word tables on their way "
            f"{weights / 2**20:.0f}"
        )


def compiled(setting: Setting) -> Found:
    """One small size through torch.compile, which takes minutes; our step is one module."""
    from torch._dynamo.utils import counters

    size = {"vocab_size": 100, "latent_dim": 8} if setting.quick else {}
    case = Case(setting.device, rows=4, length=32, width=128, depth=1, **size)
    module = torch.compile(cv.StepModule(cv.as_denoiser(case.network), case.objective))
    network = torch.compile(case.network)
    calls = partial(case.ours, module), partial(case.plain, network)
    for name, call in zip(("ours", "plain step"), calls, strict=True):
        counters.clear()
        began = time.perf_counter()
        try:
            call()
        except Exception as error:
            yield f"compiled: {name} failed: {str(error).splitlines()[0]}"
            return
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        took = time.perf_counter() - began
        yield f"compiled: {name} has {graphs} graphs, {breaks} breaks and took {took:.0f} s"
    yield setting.time("compiled", case.name, "plain step", *calls, rounds=5)


def joined(setting: Setting) -> Found:
    """Base passes in one call of the network, where what a call costs is its launches."""
    for width in (32,) if setting.quick else (64, 128, 256):
        for rows in (1, 2, 4):
            size = {"rows": rows, "length": 32, "width": width, "vocab_size": 1000}
            size |= {"terms": [cv.Text(time=1.0), cv.Latent()]}
            alone = Case(setting.device, **size)
            together = Case(setting.device, **size, join_passes=True)
            yield setting.time(
                "joined",
                f"{alone.name}, v = 1000",
                "join_passes=False",
                together.ours,
                alone.ours,
                target=1 / 1.4,
                limit=together.joint,
            )


def variants(setting: Setting) -> Found:
    """What an option makes of the FLOPs and the peak bytes of the four-pass step."""
    size = {"rows": 4, "length": 128, "width": 256}
    if setting.quick:
        size = {"rows": 4, "length": 8, "width": 32, "vocab_size": 100, "latent_dim": 8}
    four = Case(setting.device, **size)
    for name, (changes, wrap) in CHANGES.items():
        case = Case(setting.device, **size, **changes)
        call = partial(case.ours, partial(case.objective, wrap(cv.as_denoiser(case.network))))
        call()  # from here on there are gradients
        for measured in (_flops, partial(peak_bytes, device=setting.device)):
            quantity = "flops" if measured is _flops else "peak bytes"
            found = measured(call), measured(four.ours)
            yield setting.row("variants", name, quantity, "the four-pass step", *found)


def _flops(call: Call) -> int:
    """Of matrix products, which are all that the counter of torch knows."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
