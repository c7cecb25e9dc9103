"""The FSDP2 recipe in real use: bf16, accumulation, skipped steps, evaluation, saving, loading."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import cyclevae as cv
from cyclevae.testing import ToyNetwork, toy_batch, toy_denoiser
from distributed import gather, run_ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Casting(ToyNetwork):
    """Whose text head is the embedding, and which casts its latents, never its times."""

    def __init__(self):
        super().__init__(7, 4)
        self.text_head.weight = self.word.weight

    def forward(self, tokens, latents, **state):
        assert state["latent_time"].dtype == torch.float32
        return super().forward(tokens, latents.to(self.shared.weight.dtype), **state)


def work(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    network = Casting()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    objective = cv.CycleObjective(*toy_denoiser()[1:], non_finite="skip")
    denoiser = cv.as_denoiser(network)
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    batches = [toy_batch(seed=2 * part + rank) for part in range(2)]
    torch.manual_seed(rank)

    def step(number, batches):
        counts = cv.pool_counts([objective.counts(batch) for batch in batches])
        skip = False
        for batch in batches:
            network.set_requires_gradient_sync(batch is batches[-1])
            output = objective(denoiser, batch, step=number, counts=counts)
            output.loss.backward()
            skip |= bool(output.skip)
        if not skip:
            optimizer.step()
        optimizer.zero_grad()
        return skip

    assert not step(0, batches)
    saved = get_model_state_dict(network, options=WHOLE)
    with torch.no_grad():
        objective(denoiser, batches[0], step=1, generator=torch.Generator().manual_seed(0))
    bad = [batch._replace(latents=batch.latents / (rank > 0)) for batch in batches]
    with cv.check_values(False):
        assert step(1, bad)  # on both ranks
    kept = get_model_state_dict(network, options=WHOLE)
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    if rank == 0:
        plain = Casting()
        plain.load_state_dict(saved)
        assert all(x.dtype == torch.float32 for x in saved.values())
    assert not step(2, batches)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, dict(saved), options=spread)  # only rank 0 holds it
    again = get_model_state_dict(network, options=WHOLE)
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    assert gather(rank) == [0, 1]
    dist.barrier()


@pytest.mark.skipif(torch.__version__.startswith("2.5."), reason="FSDP2 of torch 2.5 needs CUDA")
def test_sharded_weights_learn_are_saved_and_loaded():
    run_ranks(work)
