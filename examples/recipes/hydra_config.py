"""Hydra: the objective from a YAML file and the command line.

python examples/recipes/hydra_config.py objective.terms.cycle_text.weight.weight=2
"""

import json
from pathlib import Path

import hydra
import plain
import task
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import cyclevae as cv


@hydra.main(config_path="conf", config_name="config", version_base=None)
def main(config: DictConfig) -> None:
    data = task.sentences()
    text_process, latent_process = task.make_processes(data)  # from the data, not from a file
    given = {"text_process": text_process, "latent_process": latent_process}
    objective = cv.CycleObjective.from_config(given | dict(config.objective))
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "objective.json").write_text(json.dumps(objective.to_config(), indent=2))

    network = task.make_network(data, config.seed)
    plain.train(
        network,
        objective,
        data,
        epochs=config.epochs,
        batch=config.batch,
        learning_rate=config.learning_rate,
    )
    task.report("hydra_config", task.measure(network, data, objective))


if __name__ == "__main__":
    main()
