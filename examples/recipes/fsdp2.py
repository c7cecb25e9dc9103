"""FSDP2: the network sharded in place, block by block.

torchrun --nproc-per-node 2 examples/recipes/fsdp2.py
"""

import task
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import cyclevae as cv


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(kind, (ranks,))
    data = task.sentences()
    network, objective = task.make_network(data), task.make_objective(data)
    for block in network.blocks.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)  # what is left: embeddings and heads
    denoiser = cv.as_denoiser(network)
    optimizer = torch.optim.AdamW(network.parameters(), task.LEARNING_RATE)  # of the shards
    rows = task.Mixed(data)
    sampler = DistributedSampler(rows)
    loader = DataLoader(rows, task.BATCH // ranks, sampler=sampler)
    torch.manual_seed(rank)  # each rank has noise of its own
    step = 0
    for epoch in range(task.EPOCHS):
        sampler.set_epoch(epoch)
        for fields in tqdm(loader, f"fsdp2, epoch {epoch}", leave=False, disable=rank > 0):
            batch = cv.Batch(**fields)
            counts = cv.pool_counts([objective.counts(batch)])
            output = objective(denoiser, batch, step=step, counts=counts)
            optimizer.zero_grad()
            output.loss.backward()
            if not output.skip:  # None, but for non_finite="skip"; ranks agree
                optimizer.step()
            step += 1
    whole = get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        network = task.make_network(data)
        network.load_state_dict(whole)
        task.report("fsdp2", task.measure(network, data, objective))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
