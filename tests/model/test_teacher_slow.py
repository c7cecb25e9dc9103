"""A teacher of a sharded network: made before `fully_shard`, and sharded in the same way."""

import copy
import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from cyclevae.model.teacher import Teacher
from cyclevae.priors.learned import learned_prior
from cyclevae.testing import toy_batch, toy_denoiser
from distributed import gather, run_ranks

DECAY = 0.75
TORCH_2_5 = torch.__version__.startswith("2.5.")


def sharded_worker(rank):
    from torch.distributed._composable.fsdp import fully_shard

    warnings.simplefilter("ignore")
    denoiser, text_process, latent_process = toy_denoiser()
    mask, generator = toy_batch().attention_mask, torch.Generator()

    def judged(teacher):
        z = torch.ones(3, 4, requires_grad=True)
        learned_prior(
            teacher.denoiser,
            z,
            mask,
            text_process=text_process,
            latent_process=latent_process,
            generator=generator.manual_seed(0),
        ).backward()
        return z.grad

    whole = denoiser.module
    expected, teacher = (Teacher(whole, DECAY) for _ in range(2))
    mesh, network = init_device_mesh("cpu", (2,)), copy.deepcopy(whole)
    for module in (network, teacher.network):
        fully_shard(module, mesh=mesh)
    for step in range(2):
        with torch.no_grad():
            for part in (whole, network):
                for i, parameter in enumerate(part.parameters()):
                    parameter.add_(step + i)
        expected.update(whole)
        teacher.update(network)
        torch.testing.assert_close(judged(teacher), judged(expected))
    teacher.network.reshard()
    for name, parameter in teacher.network.named_parameters():
        assert type(parameter).__name__ == "DTensor"
        torch.testing.assert_close(parameter.full_tensor(), expected.network.get_parameter(name))
    grads = gather(judged(teacher))
    assert torch.equal(*grads)
    with pytest.raises(AssertionError, match="deepcopy"):
        Teacher(network)


@pytest.mark.skipif(TORCH_2_5, reason="FSDP2 of torch 2.5 needs CUDA")
def test_a_sharded_network():
    run_ranks(sharded_worker)
