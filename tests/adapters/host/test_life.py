"""How runs of the host begin, end and follow each other, through its own entry."""

import json

import pytest
from launch import WITH_CYCLE

IMPORTS = "from cyclevae.adapters.latentdlm import load_weights, resume, with_cycle"
CYCLE = {"loss.loss_type": "cycle_vae", "latent_parameterization": "x0"}


def column(run, name):
    return [row.get(name) for row in run.log]


def test_a_warm_start_from_a_checkpoint_of_the_host(train):
    """An l2t run of the host alone, which predicts epsilon, goes on with cycles and a new head."""
    alone = train(overrides={"loss.loss_type": "l2t"}, steps=3)
    values = {**CYCLE, "loss.cycle_warmup_steps": 2}
    folder = repr(str(alone.checkpoint.parent))
    block = f"{WITH_CYCLE}\nload_weights({folder}, trainer, skip=['latent_head.*'])"
    run = train(block=block, imports=IMPORTS, overrides=values)
    assert column(run, "step") == [0, 1, 2, 3]
    assert column(run, "cycle_weight") == pytest.approx([0, 0, 1.1, 1.1])
    assert "cycle_text from step 2" in run.output
    assert (
        run.log[0]["text_loss"]
        < train(overrides={"loss.loss_type": "l2t"}, steps=1).log[0]["text_loss"]
    )
    # by resume the cycles would begin at once
    block = f"{WITH_CYCLE}\nstate = resume({folder}, trainer, optimizer)"
    epsilon = {"latent_parameterization": "epsilon", "loss.latent_t_mode": "random"}
    epsilon |= {"loss.cycle_latent_t_max": 0.9, "loss.cycle_bridge_steps": 4}
    run = train(block=block, imports=IMPORTS, overrides=values | epsilon, check=False)
    assert run.returncode and "set `loss.cycle_start_step: 3`" in run.output


def test_cycles_as_a_phase(train):
    phases = [{"type": "l2t", "steps": 2}, {"type": "t2l", "steps": 1}]
    phases += [{"type": "cycle_vae", "steps": 3}]
    values = {**CYCLE, "loss.loss_type": "sequential", "training.sequential_schedule": phases}
    values |= {"loss.cycle_warmup_steps": 1, "logging.eval_freq": 2}
    run = train(block=WITH_CYCLE, overrides=values, steps=6)
    assert [weight is not None for weight in column(run, "cycle_weight")] == [False] * 3 + [
        True
    ] * 3
    assert column(run, "cycle_weight")[3:] == pytest.approx([0, 1.1, 1.1])
    assert "Eval" in run.output


@pytest.mark.parametrize("warm_up", [0, 50])
def test_a_dead_model_stops_the_run_and_leaves_the_checkpoint(train, warm_up):
    """It dies behind the checkpoint of step 2; nothing is written over it."""
    kill = """
def kill(module, inputs, options):
    if options.get("step", 0) == 2:
        with torch.no_grad():
            model.latent_head[-1].weight.fill_(float("nan"))
            model.text_head.weight.fill_(float("nan"))
trainer.register_forward_pre_hook(kill, with_kwargs=True)
torch.cuda.is_available  # the host's own import
import cyclevae
globals()["off"] = cyclevae.check_values(False)
off.__enter__()
"""
    values = {**CYCLE, "loss.cycle_warmup_steps": warm_up, "loss.cycle_dead_steps": 3}
    values |= {"logging.save_freq": 2}
    block = WITH_CYCLE + kill
    run = train(block=block, overrides=values, steps=8, check=False)
    assert run.returncode
    error = run.output[run.output.rindex("FloatingPointError") :]
    assert "are not finite" in error or "no term of the loss was finite" in error
    assert all(value.isfinite().all() for value in run.weights().values())


def test_learned_priors_read_a_run_of_the_host(train):
    mode = {"loss.loss_type": "unconditional", "latent_parameterization": "x0"}
    teacher = train(overrides=mode, steps=2)
    values = {**CYCLE, "loss.prior_weight": 0.01, "loss.prior_teacher": str(teacher.checkpoint)}
    for more in ({"prior_name": "learned"}, {"prior_name": "ddvi", "prior_sleep_weight": 0.1}):
        extra = {f"loss.{key}": value for key, value in more.items()}
        run = train(block=WITH_CYCLE, overrides=values | extra, steps=2)
        assert all(value > 0 for value in column(run, "prior_loss"))
    assert all(value > 0 for value in column(run, "sleep_loss"))
    assert json.dumps(run.log)


@pytest.mark.parametrize("config", ["mmdit", "mmdit_e5", "mmdit_1024d", "mmdit_preprocessed"])
def test_every_config_of_the_host_goes_through(checkout, config):
    """Three of them have `multimodal_mdlm`, for which the host trains `unconditional`."""
    hydra = pytest.importorskip("hydra")
    from cyclevae.adapters.latentdlm.config import LossKeys
    from cyclevae.adapters.latentdlm.modes import check_loss_type

    folder = str(checkout / "latentDLM_mmdit" / "configs")
    with hydra.initialize_config_dir(folder, version_base=None):
        loaded = hydra.compose(config)
    assert check_loss_type(loaded) in ("multimodal_mdlm", "l2t")
    assert LossKeys.read(loaded.loss).given() == []
