"""Hydra: the objective from a YAML file and the command line.

python examples/recipes/hydra_config.py objective.cycle_text_weight.weight=2
"""

import json
from pathlib import Path

import hydra
import task
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from tqdm import tqdm

import cyclevae as cv


@hydra.main(config_path="conf", config_name="config", version_base=None)
def main(config: DictConfig) -> None:
    data = task.sentences()
    processes = task.make_processes(data)  # ids and sizes follow from the data, not from a file
    known = cv.CycleObjective(*processes).to_config()
    options = OmegaConf.to_container(config.objective, resolve=True)
    objective = cv.CycleObjective.from_config(known | options)
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "objective.json").write_text(json.dumps(objective.to_config(), indent=2))

    network = task.make_network(data, config.seed)
    denoiser = cv.as_denoiser(network)
    loader = DataLoader(task.Mixed(data), config.batch, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate)
    step = 0
    for epoch in range(config.epochs):
        for fields in tqdm(loader, f"epoch {epoch}", leave=False):
            output = objective(denoiser, cv.Batch(**fields), step=step)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            step += 1
    task.report("hydra_config", task.measure(network, data, objective))


if __name__ == "__main__":
    main()
