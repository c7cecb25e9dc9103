"""How runs of the adapter begin, go through phases, end, and are read from outside."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch

import cyclevae as cv
from counters import HostSyncs
from cyclevae import check_values
from cyclevae.adapters.latentdlm import load_weights, resume, with_cycle
from cyclevae.adapters.latentdlm.trainer import rows_of
from cyclevae.adapters.latentdlm.watch import Watch
from latentdlm_host import make_batch, make_host


def cycle(**options):
    return with_cycle(make_host(**{"loss_type": "cycle_vae", "quick": True, **options}))


def run(trainer, steps, optimizer=None):
    """The metrics of steps as the host's log reads them."""
    found = []
    for number in steps:
        loss, metrics = trainer(make_batch(seed=number), step=number)
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(dict(metrics.items()))
    return found


def save(folder, trainer, step=0, optimizer=None):
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer or torch.optim.AdamW(trainer.parameters())
    content = {
        "model_state_dict": trainer.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "state": SimpleNamespace(step=step),
    }
    torch.save(content, folder / "checkpoint.pt")
    return folder


@pytest.fixture(autouse=True)
def plain_state(monkeypatch):
    """Counters of the test's own, where the host has its dataclass."""
    monkeypatch.setattr(
        "cyclevae.adapters.latentdlm.checkpoints._STATE", ("types", "SimpleNamespace")
    )


# From a checkpoint to a text


def test_what_was_trained_writes_and_reads(tmp_path):
    folder = save(tmp_path / "latest", cycle())
    trainer = cycle()
    load_weights(folder, trainer)
    rows = rows_of(make_batch(seed=0))
    processes = {"text_process": trainer.text_process, "latent_process": trainer.latent_process}
    written = cv.best_text(
        trainer.denoiser, rows.latents, rows.attention_mask, samples=2, steps=2, **processes
    )
    assert written.tokens.shape == rows.tokens.shape
    found = cv.encode(trainer.denoiser, written.tokens, written.attention_mask, **processes)
    assert found.shape == rows.latents.shape
    trainer.loss_type = "l2t"
    with pytest.raises(ValueError, match="loss_type 'l2t' runs no cycles"):
        trainer.denoiser  # noqa: B018


# A dead model


@pytest.fixture
def no_checks():
    """As on CUDA, where no value is read; on the CPU a bridge that is not finite raises at once."""
    with check_values(False):
        yield


def dead(trainer):
    with torch.no_grad():
        trainer.model.mix[0].weight.fill_(torch.nan)
    return trainer


@pytest.mark.parametrize("rule", ["zero", None])
def test_a_dead_model_is_an_error_after_some_steps(no_checks, rule):
    trainer = dead(cycle(cycle_non_finite=rule, cycle_dead_steps=3))
    run(trainer, range(2))
    with pytest.raises(FloatingPointError, match="no term of the loss was finite for 3 steps in a"):
        run(trainer, [2])


def test_steps_that_are_bad_now_and_then_or_in_part_are_none(no_checks):
    trainer, healthy = cycle(cycle_dead_steps=2), cycle()
    for number in range(8):
        trainer.load_state_dict(healthy.state_dict())
        if number % 2:
            dead(trainer)
        run(trainer, [number])
    trainer = cycle(cycle_dead_steps=2)
    with torch.no_grad():
        trainer.model.text_head.bias.fill_(torch.nan)  # base T2L is finite still
    assert all(row["non_finite_terms"] > 0 for row in run(trainer, range(6)))


def test_a_batch_of_bad_rows_is_no_dead_model():
    batch = make_batch()
    batch["latent"][:] = torch.nan
    batch["attention_mask"][:] = 0
    trainer = cycle(cycle_dead_steps=2)
    for number in range(6):
        assert trainer(batch, step=number)[0].item() == 0


def test_looking_waits_for_nothing():
    watch = Watch(2)
    with HostSyncs("meta") as syncs:
        for _ in range(5):
            watch.note(torch.zeros((), dtype=torch.bool, device="meta"))
    assert syncs.found == []
    assert copy.deepcopy(watch).limit == 2


def test_no_checkpoint_is_made_of_a_dead_model():
    for wrong in (torch.nan, torch.inf):
        trainer = cycle()
        with torch.no_grad():
            trainer.model.latent_head.bias[1] = wrong
        with pytest.raises(
            FloatingPointError, match=r"1 of \d+ parameters are not finite, such as"
        ):
            trainer.state_dict()
        assert trainer.host.state_dict()
    assert dead(cycle(loss_type="l2t")).state_dict()  # the host's own affair


def test_a_warm_up_tells_of_a_dead_model_too():
    """Without a cycle no bridge is looked at."""
    trainer = dead(cycle(cycle_warmup_steps=100, cycle_dead_steps=3))
    with pytest.raises(FloatingPointError, match="the model is dead"):
        run(trainer, range(3))


def test_no_dead_checkpoint_is_loaded(tmp_path):
    folder = save(tmp_path / "latest", dead(cycle(loss_type="l2t")))
    trainer = cycle()
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match="holds a dead model: 1 of"):
        load_weights(folder, trainer)
    with pytest.raises(ValueError, match="holds a dead model"):
        resume(folder, trainer, torch.optim.AdamW(trainer.parameters()))
    assert all(torch.equal(before[n], w) for n, w in trainer.state_dict().items())


def test_fp16_is_refused():
    with pytest.raises(ValueError, match=r"`training.dtype` is fp16, .* take bf16 or fp32"):
        cycle(dtype=torch.float16)
    cycle(dtype=torch.float16, loss_type="l2t")  # the host's own affair


# Warm starts


def test_weights_alone_begin_at_step_0(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cyclevae")
    folder = save(tmp_path / "latest", cycle(loss_type="l2t", seed=3), step=50_000)
    trainer = cycle(cycle_warmup_steps=2)
    load_weights(folder, trainer)
    other = make_host(seed=3, quick=True).state_dict()
    assert all(torch.equal(other[n], w) for n, w in trainer.state_dict().items())
    rows = run(trainer, range(3))
    assert [row["cycle_text_weight"] for row in rows] == [0, 0, 1]
    assert "cyclevae: step 0: text 1, latent 0.1, cycle_text from step 2" in caplog.text
    load_weights(folder / "checkpoint.pt", make_host(quick=True))  # the bare host too


@pytest.mark.parametrize(
    ("saved", "here"), [("x0", "v_param"), ("epsilon", "x0"), ("v_param", "x0")]
)
def test_a_head_that_predicts_something_else_is_trained_anew(tmp_path, saved, here):
    folder = save(tmp_path, cycle(loss_type="l2t", parameterization=saved, seed=1))
    trainer = cycle(parameterization=here)
    with pytest.raises(ValueError, match=f"trained with `latent_parameterization` '{saved}', and"):
        load_weights(folder, trainer)
    with pytest.raises(ValueError, match="begin a new run by load_weights"):
        resume(folder, trainer, torch.optim.AdamW(trainer.parameters()))
    fresh = {n: p.clone() for n, p in trainer.model.latent_head.named_parameters()}
    load_weights(folder, trainer, skip=["latent_head.*"])
    assert all(torch.equal(p, fresh[n]) for n, p in trainer.model.latent_head.named_parameters())
    loaded = make_host(seed=1, quick=True).model.text_head.weight
    assert torch.equal(trainer.model.text_head.weight, loaded)


def test_a_skip_that_fits_nothing(tmp_path):
    folder = save(tmp_path, cycle())
    with pytest.raises(ValueError, match=r"'latent_haed.*' fits no parameter"):
        load_weights(folder, cycle(), skip=["latent_haed.*"])


def test_a_checkpoint_that_tells_nothing_is_named(tmp_path, caplog):
    load_weights(save(tmp_path, make_host(quick=True)), cycle())
    assert "does not tell what it predicts" in caplog.text


def test_a_warm_up_that_is_spent_is_refused(tmp_path):
    folder = save(tmp_path / "latest", cycle(loss_type="l2t"), step=500)
    for options in ({"cycle_warmup_steps": 1000}, {"cycle_text_warmup_steps": 10}):
        trainer = cycle(**options)
        with pytest.raises(ValueError, match=r"step 500 of a run with l2t, and .*start_step: 500`"):
            resume(folder, trainer, torch.optim.AdamW(trainer.parameters()))
    trainer = cycle(cycle_warmup_steps=2, cycle_start_step=500)
    assert resume(folder, trainer, torch.optim.AdamW(trainer.parameters())).step == 500
    rows = run(trainer, range(500, 503))
    assert [row["cycle_text_weight"] for row in rows] == [0, 0, 1]
    resume(save(tmp_path / "b", trainer, 502), cycle(cycle_warmup_steps=2), _adam(trainer))


def _adam(trainer):
    return torch.optim.AdamW(trainer.parameters())


def test_the_log_tells_of_a_checkpoint_that_the_host_wrote(tmp_path):
    folder = save(tmp_path / "latest", make_host(quick=True), step=2)
    rows = [{"step": step, "loss": 1.0} for step in range(4)]
    log = tmp_path / "training_log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = cycle(cycle_warmup_steps=5)
    with pytest.raises(ValueError, match="a run with another loss_type"):
        resume(folder, trainer, _adam(trainer))
    log.write_text("".join(json.dumps({**row, "cycle_weight": 0.0}) + "\n" for row in rows))
    resume(folder, trainer, _adam(trainer))


# The log of runs that are interrupted again and again


def test_no_row_of_a_log_is_lost(tmp_path):
    folder = save(tmp_path / "saved" / "run" / "latest", cycle(), step=20)
    logging_keys = SimpleNamespace(save_dir=str(tmp_path / "saved"), run_name="run", eval_freq=10)
    log = folder.parent / "training_log.jsonl"
    for number in range(3):  # each time the host is started, and empties its log
        log.write_text(f"run {number}\n")
        trainer = cycle()
        trainer.config.logging = logging_keys
        resume(folder, trainer, _adam(trainer))
    kept = sorted(path.read_text() for path in folder.parent.glob("training_log-20*.jsonl"))
    assert kept == ["run 0\n", "run 1\n", "run 2\n"]


def test_the_log_that_is_kept_is_that_of_the_run_that_begins(tmp_path):
    folder = save(tmp_path / "old" / "latest", cycle(), step=20)
    (folder.parent / "training_log.jsonl").write_text("old\n")
    new = tmp_path / "new" / "run"
    new.mkdir(parents=True)
    (new / "training_log.jsonl").write_text("new\n")
    trainer = cycle()
    trainer.config.logging = SimpleNamespace(save_dir=str(tmp_path / "new"), run_name="run")
    resume(folder, trainer, _adam(trainer))
    assert (new / "training_log-20.jsonl").read_text() == "new\n"
    assert not list(folder.parent.glob("training_log-*"))


# Evaluations


@pytest.mark.parametrize("mode", ["cycle_vae", "l2t", "unconditional"])
def test_a_run_that_evaluates_resumes_exactly(tmp_path, mode):
    """The host's workers, started by the first evaluation of a process, draw once."""

    def go_on(trainer, steps, started):
        for number in steps:
            run(trainer, [number])
            torch.rand(1)  # as dropout draws
            found.append(torch.get_rng_state())
            if number % 2:
                trainer.eval()
                if not started:
                    torch.randint(9, ())
                started = True
                with torch.no_grad():
                    trainer(make_batch())
                    trainer(make_batch())
                trainer.train()

    found = []
    torch.manual_seed(0)
    whole = cycle(loss_type=mode)
    whole.config.logging = SimpleNamespace(eval_freq=2)
    go_on(whole, range(4), started=False)
    folder = save(tmp_path / "latest", whole, step=4)
    torch.save({"torch": torch.get_rng_state()}, folder / "rng_state_0.pt")
    go_on(whole, range(4, 8), started=True)
    expected, found = found[4:], []
    torch.manual_seed(1)
    resumed = cycle(loss_type=mode)
    resumed.config.logging = SimpleNamespace(eval_freq=2)
    resume(folder, resumed, _adam(resumed))
    go_on(resumed, range(4, 8), started=False)
    assert all(map(torch.equal, found, expected))


# Phases

PHASES = [
    {"type": "l2t", "steps": 2},
    {"type": "t2l", "steps": 1},
    {"type": "cycle_vae", "steps": 4},
]


def sequential(phases=PHASES, **options):
    training = {"sequential_schedule": phases}
    return cycle(loss_type="sequential", training=training, **options)


def test_cycles_are_a_phase():
    trainer = sequential(cycle_warmup_steps=1, cycle_ramp_steps=1)
    rows = run(trainer, range(10))
    modes = [row.get("training_mode", "cycle_vae") for row in rows]
    assert modes == ["l2t", "l2t", "t2l", *["cycle_vae"] * 4, "l2t", "l2t", "t2l"]
    weights = [row["cycle_text_weight"] for row in rows[3:7]]
    assert weights == [0, 0.5, 1, 1]  # counted from where the cycles begin
    assert run(trainer, [10])[0]["cycle_text_weight"] == 1  # and not anew
    alone = with_cycle(make_host(loss_type="l2t", quick=True))
    assert rows[0] == run(alone, [0])[0]
    assert trainer.host.loss_type == trainer.loss_type == "sequential"


def test_an_evaluation_is_in_the_mode_of_the_last_step():
    trainer = sequential()
    for step in (0, 2, 3):
        run(trainer, [step])
        metrics = trainer.eval()(make_batch())[1]
        trainer.train()
        expected = {0: "l2t", 2: "t2l"}.get(step)
        assert metrics.get("training_mode") == expected
    assert "cycle_text_loss" in metrics


def test_phases_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"schedule\[0\].type` is 'cycle'; did you mean 'cycle_vae'"
    ):
        sequential([{"type": "cycle"}])
    with pytest.raises(ValueError, match=r"leave out `loss.cycle_start_step`"):
        sequential(cycle_start_step=3)


# What is set from outside


def test_a_mode_that_is_set_is_the_mode():
    trainer = cycle()
    trainer.loss_type = "l2t"
    assert run(trainer, [1])[0]["training_mode"] == "l2t"
    trainer.loss_type = "cycle_vae"
    assert "cycle_text_loss" in run(trainer, [2])[0]
    with pytest.raises(ValueError, match="'cycle_vea', for which"):
        trainer.loss_type = "cycle_vea"
    assert trainer.loss_type == "cycle_vae"


def test_what_was_read_cannot_be_set():
    trainer = cycle()
    for name in ("model", "latent_diffusion", "config", "dtype", "tokenizer", "mask_token_id"):
        with pytest.raises(AttributeError, match=f"`trainer.{name}` was read when with_cycle was"):
            setattr(trainer, name, getattr(trainer.host, name))
    trainer.current_epoch, trainer.current_step, trainer.note = 3, 4, 5
    assert (trainer.host.current_epoch, trainer.host.current_step, trainer.note) == (3, 4, 5)


@pytest.mark.parametrize("given", [{"loss_type": "multimodal_mdlm"}, {}])
def test_the_default_mode_of_the_host_goes_on(given, caplog):
    host = make_host(loss_type="multimodal_mdlm", training={"loss_type": "l2t"}, quick=True)
    if not given:
        del host.config.loss.loss_type
    trainer = with_cycle(host)
    assert "trains unconditional; nothing reads `training.loss_type`, 'l2t'" in caplog.text
    assert run(trainer, [1])[0]["training_mode"] == "unconditional"


@pytest.mark.parametrize(("parameterization", "sign"), [("x0", 1), ("v_param", -1)])
def test_what_the_samplers_of_the_host_take_for_a_latent(parameterization, sign):
    """Their one step from noise returns the prediction; on the rows that were trained on here."""
    trainer = cycle(
        parameterization=parameterization,
        **{"base_loss": "corrected", "latent_loss_weight": 1.0, "text_loss_weight": 0.0},
        **{"cycle_text_weight": 0.0, "cycle_latent_weight": 0.0},
    )
    optimizer, batch = torch.optim.AdamW(trainer.parameters(), lr=1e-2), make_batch()
    for step in range(150):
        optimizer.zero_grad()
        trainer(batch, step=step)[0].backward()
        optimizer.step()
    times = torch.zeros(4), torch.ones(4)
    noise = torch.randn(4, 1, 8)
    latents = trainer.model(batch["input_ids"], noise, *times, batch["attention_mask"])[1][:, 0]
    cosine = torch.cosine_similarity(latents, batch["latent"]).mean()
    assert sign * cosine > 0.8


# Learned priors


@pytest.fixture
def teacher(tmp_path):
    return save(tmp_path / "teacher", cycle(loss_type="unconditional", seed=5)) / "checkpoint.pt"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("learned", {"prior_options": {"weighting": "uniform"}}),
        ("ddvi", {"prior_sleep_weight": 0.5}),
    ],
)
def test_a_prior_reads_the_weights_of_another_run(teacher, name, more):
    trainer = cycle(prior_name=name, prior_weight=0.1, prior_teacher=str(teacher), **more)
    (row,) = run(trainer, [0])
    assert row["prior_loss"] > 0 and ("sleep_loss" in row) == ("prior_sleep_weight" in more)
    judge = trainer._teacher.network
    assert torch.equal(judge.mix[0].weight, make_host(seed=5, quick=True).model.mix[0].weight)
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    names = list(make_host(quick=True).state_dict())
    assert list(trainer.state_dict()) == names  # and no parameter of its own
    assert len(list(trainer.parameters())) == len(list(trainer.host.parameters()))
    run(trainer, range(3), _adam(trainer))
    assert torch.equal(judge.mix[0].weight, make_host(seed=5, quick=True).model.mix[0].weight)
    assert next(trainer.double()._teacher.network.parameters()).dtype == torch.float64


def test_a_teacher_of_another_process(teacher, tmp_path):
    options = {"prior_name": "learned", "prior_weight": 0.1}
    with pytest.raises(
        ValueError, match=r"`loss.prior_teacher`: .* 'v_param', and here it is 'x0'"
    ):
        cycle(parameterization="x0", prior_teacher=str(teacher), **options)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint at"):
        cycle(prior_teacher=str(tmp_path / "none.pt"), **options)
    with pytest.raises(ValueError, match=r"`loss.prior_pool` has no effect on the prior 'learned'"):
        cycle(prior_teacher=str(teacher), prior_pool=True, **options)


# Metrics


def test_rows_of_a_warm_up_have_the_weights_and_the_norm():
    trainer, batch = cycle(cycle_warmup_steps=9), make_batch()
    (row,) = run(trainer, [0])
    expected = make_host(quick=True)(make_batch(seed=0))[1]["latent_norm"]
    assert row["cycle_weight"] == row["cycle_text_weight"] == row["cycle_latent_weight"] == 0
    assert row["latent_norm"] == pytest.approx(expected)
    batch["latent"][0] = torch.nan
    assert dict(trainer(batch, step=1)[1].items())["latent_norm"] == pytest.approx(
        expected, rel=0.1
    )


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "rows", "match"),
    [
        ({"prior_options": {"mean": [1.0, 2.0]}}, 4, "`loss.prior_options.mean` must be a number"),
        ({}, 1, "raise the batch size or set `loss.prior_weight: 0`"),
        (
            {"cycle_text_policy": {"bridge": "last", "freeze": ["nothing"]}},
            4,
            r"pattern 'nothing' under `freeze` of a `loss.cycle_\*_policy` matches no",
        ),
        ({"cycle_non_finite": "raise"}, 4, "or let `loss.cycle_non_finite: zero` pass over"),
    ],
)
def test_errors_of_a_step_name_keys_of_the_host(options, rows, match, no_checks):
    trainer = cycle(prior_weight=0.1, **options)
    if "cycle_non_finite" in options:
        dead(trainer)
    with pytest.raises((ValueError, FloatingPointError), match=match):
        trainer(make_batch(rows), step=0)
