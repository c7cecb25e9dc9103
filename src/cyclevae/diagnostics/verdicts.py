"""From numbers to verdicts: one function for each known pitfall. Rules of thumb, not tests."""

import math
from typing import NamedTuple

from cyclevae.diagnostics.chance import Chance
from cyclevae.diagnostics.cheat import CheatTest
from cyclevae.diagnostics.health import LatentHealth, Retrieval

SURE = 2.0  # standard errors: a gap within them may be chance
HEARD = 0.01  # a condition that lowers a loss by less than this share counts as ignored
NOTHING = 0.05  # accuracy above the floor: below it nothing crosses, so nothing can be judged
SMALL = 0.1  # standard deviations: by less, no meaning of a standardised latent changes
FRAGILE = 0.5  # of what crosses, the share that a small change may cost
COLLUSION = 0.1  # accuracy, or share of variance, by which a cycle may be better than pairs
STILL = 0.1  # of the target's standard deviation: 1 % of its variance, as for one active dimension
NARROW = 0.25  # of the true latents' effective rank, or active dimensions
HUBS = 0.8  # share of latents never retrieved: 0.37 where texts take latents at random
STRETCH = 2.0  # by which length or spread may differ: a decoder hardly saw such latents
DRIFT = 0.5  # standard deviations between the means
LEARNED = 0.02  # of the words that a guess gets wrong, or of the variance: less is chance
BELOW = 0.9  # of the entropy of words without the latent: a loss below it is no guess
FEW = 0.1  # a gain that luck alone may reach with so few words


class Verdict(NamedTuple):
    """Whether a pitfall was avoided.

    Attributes:
        name: of the pitfall.
        ok: True if it was avoided, False if not, None if the batch does not tell.
        measured: on what that rests.
        cure: what to do; empty where there is nothing to.

    Examples:
        >>> print(Verdict("collapse", False, "nothing varies", "use a prior"))
        FAIL  collapse                nothing varies; use a prior
    """

    name: str
    ok: bool | None
    measured: str
    cure: str = ""

    @property
    def sentence(self) -> str:
        """What was measured, and what to do."""
        return f"{self.measured}; {self.cure}" if self.cure else self.measured

    @property
    def mark(self) -> str:
        """`ok`, `FAIL` or, where the batch does not tell, `?`."""
        return {True: "ok", False: "FAIL", None: "?"}[self.ok]

    def __str__(self) -> str:
        return f"{self.mark:<4}  {self.name:<22}  {self.sentence}"


def ill_conditioned_bridge(gain: float, max_gain: float) -> Verdict:
    """Does reading `z_hat` multiply the error of the prediction beyond all use?"""
    return _verdict(
        "ill-conditioned bridge",
        gain <= max_gain,
        f"reading z_hat multiplies the prediction's error by {gain:.3g}; max_gain is {max_gain:g}",
        "a loss near 0 says nothing here: predict `v` or `x0`, or cap the time, in T2L's training "
        "too, and take LatentBridge(steps=4)",
    )


def decoder_at_chance(found: Chance) -> Verdict:
    """Does the decoder write more of the texts than can be guessed without their latents?"""
    name = "decoder at chance"
    if not found.words:
        return Verdict(name, None, "not judged: every word of the batch is a placed one")
    luck = found.gain_error
    measured = (
        f"{found.accuracy:.1%} of {found.words} words are right from true latents, and "
        f"{found.guess:.1%} by the most frequent word of each position"
    )
    cure = (
        "train `Text` on pairs for longer, and on more of them where its loss on training pairs is "
        "low already"
    )
    if found.loss < BELOW * found.entropy or found.gain > max(LEARNED, luck):
        return _verdict(name, True, measured, cure)
    return _verdict(name, None if luck > FEW and found.gain > 0 else False, measured, cure)


def encoder_at_chance(latent_error: float, found: Retrieval, alike: float, rows: int) -> Verdict:
    """Is `z_hat` nearer to its text's latent than the mean of all latents, or tells it which?"""
    luck, ok = alike + SURE * math.sqrt(alike * (1 - alike) / rows), latent_error < 1 - LEARNED
    few = luck - alike > FEW and found.recall > alike
    return _verdict(
        "encoder at chance",
        ok or found.recall > luck or (None if few else False),
        f"z_hat misses {latent_error:.3g} of the latents' variance, where their mean misses 1, and "
        f"finds {found.recall:.1%} of the latents, {alike:.1%} by chance",
        "train T2L on pairs at the bridge's time for longer, and on more of them where its loss on "
        "training pairs is low already",
    )


def ignored_latent(gap: float, error: float, shuffled: float) -> Verdict:
    """Does the decoder read the latent?"""
    return _verdict(
        "ignored latent",
        _heard(gap, error, shuffled),
        f"another row's latent costs the decoder {gap:.3g} +- {error:.2g} of {shuffled:.3g} nats",
        "raise the weight of `Text`, and keep the text fully masked in L2T: words that show let "
        "the decoder do without",
    )


def ignored_text(gap: float, error: float, right: float, shuffled: float) -> Verdict:
    """Does the encoder's `z_hat` depend on its text?"""
    return _verdict(
        "ignored text",
        _heard(gap, error, shuffled),
        f"z_hat misses {right:.3g} of the latents' variance, and {shuffled:.3g} (+- {error:.2g}) "
        "from another row's text",
        "train T2L on pairs at the bridge's time, and raise the weight of `Latent`",
    )


def collapse(z_hat: LatentHealth, latents: LatentHealth, found: Retrieval) -> Verdict:
    """Do the encoder's latents still tell texts apart?"""
    return _verdict(
        "collapse",
        z_hat.scale >= STILL
        and z_hat.effective_rank >= NARROW * latents.effective_rank
        and z_hat.active >= NARROW * latents.active
        and found.never <= HUBS,
        f"z_hat has spread {z_hat.scale:.3g}, effective rank {z_hat.effective_rank:.3g} of "
        f"{latents.effective_rank:.3g}, and never retrieves {found.never:.0%} of the latents",
        "a prior spreads it, as Prior('mmd', standardize=True), and Contrastive() tells texts "
        "apart",
    )


def scale_drift(z_hat: LatentHealth, latent_error: float) -> Verdict:
    """Are the encoder's latents where the decoder expects latents to be?

    The mean of the latents that a text may have spreads less than they do, by what it leaves open.
    """
    stretch, told = z_hat.norm / z_hat.target_norm, math.sqrt(max(0.0, 1 - latent_error))
    return _verdict(
        "scale drift",
        max(stretch, z_hat.scale) <= STRETCH
        and STRETCH * z_hat.scale >= told
        and z_hat.drift <= DRIFT,
        f"z_hat has {stretch:.3g} times the length and {z_hat.scale:.3g} times the spread of the "
        f"latents, and its mean is {z_hat.drift:.3g} standard deviations off",
        "Prior('moment') holds all three, and LatentBridge(norm=...) the length where a model was "
        "trained on directions alone",
    )


def hidden_code(cheat: CheatTest) -> Verdict:
    """Does what crosses survive a change that alters no meaning?"""
    name, crosses = "hidden code", cheat.cycle - cheat.floor
    small = [treatment for treatment in cheat.treatments if treatment.size <= SMALL]
    if not small:
        return Verdict(name, None, f"not judged: no treatment is as small as {SMALL:g}")
    if crosses <= NOTHING:
        return Verdict(name, None, "not judged: nothing crosses that could hide")
    worst = min(small, key=lambda treatment: (treatment.cycle, -treatment.size))
    return _verdict(
        name,
        cheat.cycle - worst.cycle <= FRAGILE * crosses,
        f"the cycle's accuracy of {cheat.cycle:.0%} is {worst.cycle:.0%} after {worst.name} (true "
        f"latents: {cheat.pairs:.0%}, then {worst.pairs:.0%}), and {cheat.floor:.0%} without the "
        "latent",
        "train with noise on the bridge, LatentBridge(noise=0.1)",
    )


def feedback_loop(cheat: CheatTest, latent_error: float, cycle_latent_error: float) -> Verdict:
    """Are the cycles better than the two directions are on pairs: do they agree on a code?"""
    name, text_works = "feedback loop", cheat.cycle - cheat.floor > NOTHING
    latent_works = cycle_latent_error < 1 - COLLUSION
    if not (text_works or latent_works):
        return Verdict(name, None, "not judged: neither cycle works yet")
    better_text = text_works and cheat.cycle - cheat.pairs > COLLUSION
    better_latent = latent_works and latent_error - cycle_latent_error > COLLUSION
    return _verdict(
        name,
        not (better_text or better_latent),
        f"text: accuracy {cheat.cycle:.0%} in the cycle, {cheat.pairs:.0%} on pairs; latent: error "
        f"{cycle_latent_error:.3g} in the cycle, {latent_error:.3g} on pairs",
        "the directions agree on a code of their own: lower the cycles' weights or let their ramp "
        "wait longer, raise the weights of `Text` and `Latent`, or add Contrastive()",
    )


def _verdict(name: str, ok: bool | None, measured: str, cure: str) -> Verdict:
    """A verdict with its cure, where it is needed."""
    return Verdict(name, ok, measured, {True: "", False: cure, None: "give more rows"}[ok])


def _heard(gap: float, error: float, shuffled: float) -> bool | None:
    """Whether a gap is there: None where it may be chance; what is no number was not heard."""
    if not gap > HEARD * shuffled:
        return False
    return True if gap > SURE * error else None
