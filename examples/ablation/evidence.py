"""The page: tables and plots of `docs/evidence.md`, from the stored results and nothing else."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import confirm
import landscape
import tables
from matrix import ALL, CONFIRMED, EXPLORATORY, FEW_SEEDS, MAP, PRIMARY, REPAIRED, SEED_MATRIX
from stored import CONTROL, HEALTH, MEASURES, Results, key_of, keys_of, row_key
from tables import CORE_ORDER, NOT_RUN

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
FEWER = ("half", "half_every_2", "half_every_4", "half_fraction")
PRIORS = ("moment", "mmd", "learned", "ddvi")
CONTROLS = EXPLORATORY[: EXPLORATORY.index("half_full_mask")]
PARTS = tuple(row for row in EXPLORATORY if row not in (*CONTROLS, *PRIORS))


def blocks(
    docstrings: Results,
    glosses: Results | None,
    seen: Results | None = None,
    mapped: Mapping[str, Results] | None = None,
    confirmed: Mapping[str, Results] | None = None,
) -> dict[str, str]:
    """Every generated part of the page, by the name between its marks."""
    core = [*keys_of(PRIMARY, *CORE_ORDER), row_key("paired", ALL, 0), row_key("oracle", ALL, 0)]
    explored = keys_of(PRIMARY, *EXPLORATORY)
    seeds, whole = ([row_key(row, pairs, 0) for row in SEED_MATRIX] for pairs in (PRIMARY, ALL))
    cycles = ("text_cycle", "latent_cycle", "both_cycles")
    recipe, control = keys_of(PRIMARY, "half", CONTROL)
    others = [key for key in keys_of(PRIMARY, *CORE_ORDER) if key != recipe]
    found = {
        "primary": tables.primary(docstrings),
        "headline": tables.headline(docstrings),
        "secondary": tables.beside(docstrings, others, recipe),
        "robustness": tables.beside(docstrings, keys_of(ALL, *cycles), row_key("paired", ALL, 0)),
        "joint-cycles": tables.beside(
            docstrings, keys_of(PRIMARY, *cycles), key_of("paired_joint", PRIMARY)
        ),
        "core": tables.measured(docstrings, core, MEASURES),
        "health": tables.measured(docstrings, core, HEALTH),
        "pairs-ce": tables.by_pairs(docstrings, "l2t_ce_true"),
        "pairs-predicted": tables.by_pairs(docstrings, "l2t_ce_predicted"),
        "pairs-r10": tables.by_pairs(docstrings, "t2l_r10"),
        "pairs-r1": tables.by_pairs(docstrings, "t2l_r1"),
        "equivalents": tables.equivalents(docstrings),
        "gap": tables.gap_closed(docstrings),
        "growth": tables.growth(docstrings),
        "costs": tables.costs(docstrings, [key for key in core if key[:2] != ("paired", ALL)]),
        "search": tables.search_table(docstrings),
        "decays": tables.decays(docstrings),
        "exploratory": tables.measured(
            docstrings, [*keys_of(PRIMARY, *CORE_ORDER), *explored], MEASURES, FEW_SEEDS
        ),
        "controls": tables.beside(docstrings, keys_of(PRIMARY, *CONTROLS), control),
        "encoded": tables.beside(
            docstrings, [key_of("encoded_cycle", PRIMARY)], key_of("encoded", PRIMARY)
        ),
        "parts": tables.beside(docstrings, keys_of(PRIMARY, *PARTS), recipe),
        "priors": tables.beside(docstrings, keys_of(PRIMARY, *PRIORS), recipe),
        "baselines": tables.baselines_table(docstrings),
        "seed-matrix": tables.measured(docstrings, seeds, MEASURES),
        "seed-matrix-all": tables.measured(docstrings, whole, MEASURES),
        "compute": tables.costs(docstrings, keys_of(PRIMARY, CONTROL, *FEWER)),
        "hours": tables.hours(docstrings, glosses),
    }
    mapped, confirmed = mapped or {}, confirmed or {}
    found |= {
        "confirmed": confirm.primary(confirmed),
        "confirmed-worth": confirm.worth(confirmed),
        "map-linearity": landscape.linearity(mapped),
        "map-decoder": landscape.values(mapped, landscape.DECODER),
        "map-encoder": landscape.values(mapped, landscape.ENCODER),
        "map-differences": landscape.differences(mapped, "half", "pseudo_ridge"),
        "map-worth-decoder": landscape.worth(mapped, landscape.DECODER),
        "map-worth-encoder": landscape.worth(mapped, landscape.ENCODER),
    }
    if seen is None:
        names = ("opponents", "opponents-differences", "few-validation", "decodings")
        found |= dict.fromkeys(names, NOT_RUN)
    else:
        rivals = [key for key in keys_of(PRIMARY, *REPAIRED) if key != recipe]
        found |= {
            "opponents": tables.opponents(seen),
            "opponents-differences": tables.beside(seen, rivals, recipe),
            "few-validation": tables.few_validation(seen),
            "decodings": tables.decodings(seen),
        }
    if glosses is None:
        names = ("glosses", "glosses-primary", "glosses-secondary", "glosses-equivalents")
        return found | dict.fromkeys(names, NOT_RUN)
    return found | {
        "glosses": tables.measured(glosses, core, MEASURES),
        "glosses-primary": tables.primary(glosses),
        "glosses-secondary": tables.beside(glosses, others, recipe),
        "glosses-equivalents": tables.equivalents(glosses),
    }


def fill(page: str, parts: Mapping[str, str]) -> str:
    """A page with the text between each pair of marks replaced."""
    for name, text in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
        page = mark.sub(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=DOCS / "evidence.md")
    options = parser.parse_args()
    import plots

    folders = {n: options.results / n for n in ("docstrings", "glosses", "seen", *MAP, *CONFIRMED)}
    if not folders["docstrings"].exists():  # a run of another corpus alone
        folders["docstrings"] = HERE / "results" / "docstrings"
        print("docstrings were not run: theirs are the stored results")
    found = {name: Results(folder) for name, folder in folders.items() if folder.exists()}
    docstrings, glosses, seen = (found.get(n) for n in ("docstrings", "glosses", "seen"))
    mapped = {name: found[name] for name in MAP if name in found}
    template = (DOCS / "evidence.md").read_text()
    confirmed = {name: found[name] for name in CONFIRMED if name in found}
    parts = blocks(docstrings, glosses, seen, mapped, confirmed)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(fill(template, parts))
    if options.page == DOCS / "evidence.md":
        README.write_text(fill(README.read_text(), parts))
    images = options.page.parent / "images"
    plots.against_pairs(docstrings, images / "evidence-pairs.svg")
    plots.curves(docstrings, images / "evidence-curves.svg")
    if seen is not None:
        plots.decodings(seen, images / "evidence-decoding.svg")
    plots.landscape(mapped, images / "evidence-map.svg")
    plots.against_compute(docstrings, FEWER, images / "evidence-compute.svg")
    print(f"wrote {options.page} and its pictures")


if __name__ == "__main__":
    main()
