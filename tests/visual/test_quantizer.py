import numpy as np
import pytest
import torch
from ranks import run_ranks

from vtrain.dist.mesh import world
from vtrain.rng import fold, fold_array
from vtrain.visual.quantizer import FiniteScalarQuantizer, VectorQuantizer, code_usage

K, D = 8, 4


def step_images(step, images=12, h=3, w=2):
    generator = torch.Generator().manual_seed(step)
    z = torch.randn(images, D, h, w, generator=generator)
    z[1] = z[0]  # latents repeat in real pictures
    keys = torch.randint(-(2**63), 2**63 - 1, (images,), generator=generator)
    return z, keys


def rows(z):
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def trained(steps=3, **options):
    quantizer = VectorQuantizer(K, D, decay=0.8, seed=5, **options)
    for step in range(steps):
        quantizer(*step_images(step))
        quantizer.end_step(step)
    return quantizer


def state(quantizer):
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same_state(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def first_candidates(step, z, keys, count, seed=5):
    """The latents of lowest priority, by the numpy generator."""
    positions = np.arange(z.shape[2] * z.shape[3], dtype=np.uint64)
    image_keys = fold_array(fold(fold(seed, "codebook"), step), keys.numpy().view(np.uint64))
    priorities = fold_array(image_keys[:, None], positions).view(np.int64).ravel()
    return rows(z)[np.argsort(priorities)[:count]]


def test_the_nearest_code_wins_and_the_first_of_equal_ones():
    quantizer = VectorQuantizer(K, D)
    quantizer.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    quantizer.embedding.weight[5] = quantizer.embedding.weight[2]
    quantizer.embedding.weight[7] = quantizer.embedding.weight[2]
    z, _ = step_images(0, 30)
    z[0] = quantizer.embedding.weight[7][:, None, None]
    ids = quantizer.ids(z)
    distances = (rows(z).double()[:, None] - quantizer.embedding.weight.double()).square().sum(-1)
    assert ids.flatten().tolist() == [int(np.flatnonzero(d == d.min())[0]) for d in distances.numpy()]
    assert set(ids[0].flatten().tolist()) == {2}


def test_gradients_pass_straight_and_commitment_pulls_to_the_code():
    quantizer = trained()
    z = step_images(9)[0].requires_grad_()
    quantized, ids, commitment = quantizer(z)
    codes = quantizer.lookup(ids).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantized, codes)
    upstream = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad(quantized, z, upstream, retain_graph=True)
    torch.testing.assert_close(gradient, upstream)
    (gradient,) = torch.autograd.grad(commitment.sum(), z)
    torch.testing.assert_close(gradient, 2 * (z - codes).detach() / z[0].numel())
    torch.testing.assert_close(commitment, (z - codes).square().flatten(1).mean(1))


def test_averages_equal_a_slow_loop():
    quantizer = trained()
    size, total = quantizer.cluster_size.double(), quantizer.embed_sum.double()
    for step in range(3, 6):
        z, keys = step_images(step)
        before = quantizer.embedding.weight.clone()
        _, ids, _ = quantizer(z, keys)
        torch.testing.assert_close(quantizer.embedding.weight, before)  # until the step ends
        usage = quantizer.end_step(step)
        counts, sums = torch.zeros(K).double(), torch.zeros(K, D).double()
        for latent, code in zip(rows(z), ids.flatten()):
            counts[code] += 1
            sums[code] += latent
        size, total = 0.8 * size + 0.2 * counts, 0.8 * total + 0.2 * sums
        assert int(usage["codes_reset"]) == 0
        smoothed = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
        torch.testing.assert_close(quantizer.embedding.weight.double(), total / smoothed[:, None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantizer.cluster_size.double(), size, rtol=1e-5, atol=1e-6)
        assert int(usage["codes_used"]) == int((counts > 0).sum())
        shares = counts[counts > 0] / counts.sum()
        assert float(usage["perplexity"]) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5)


def test_the_codebook_begins_as_latents_of_the_first_step():
    z, keys = step_images(0)
    quantizer = VectorQuantizer(K, D, seed=5)
    quantizer(z, keys)
    usage = quantizer.end_step(0)
    assert int(usage["codes_reset"]) == K
    torch.testing.assert_close(quantizer.embedding.weight, first_candidates(0, z, keys, K), rtol=0, atol=0)


def test_dead_codes_restart_from_the_step_in_order():
    quantizer = trained()
    for code in (2, 6):
        quantizer.embedding.weight[code] = 1e3
        quantizer.cluster_size[code] = 1e-3
        quantizer.embed_sum[code] = 1.0
    z, keys = step_images(3)
    quantizer(z, keys)
    usage = quantizer.end_step(3)
    assert int(usage["codes_reset"]) == 2
    torch.testing.assert_close(quantizer.embedding.weight[[2, 6]], first_candidates(3, z, keys, 2), rtol=0, atol=0)
    torch.testing.assert_close(quantizer.embed_sum, quantizer.embedding.weight * quantizer.cluster_size[:, None])
    quantizer(*step_images(4))
    assert int(quantizer.end_step(4)["codes_reset"]) == 0  # a restarted code is given time


def test_a_step_with_fewer_latents_than_dead_codes():
    quantizer = VectorQuantizer(K, D, seed=5)
    z, keys = step_images(0, images=2, h=1, w=2)
    z[1] += 1
    quantizer(z, keys)
    assert int(quantizer.end_step(0)["codes_reset"]) == 4
    torch.testing.assert_close(quantizer.embedding.weight[:4], first_candidates(0, z, keys, 4), rtol=0, atol=0)
    assert quantizer.embedding.weight[4:].abs().max() == 0
    quantizer(*step_images(1))
    assert int(quantizer.end_step(1)["codes_reset"]) > 0
    assert quantizer.embedding.weight.abs().amax(1).min() > 0


def test_the_first_step_hands_latents_through():
    quantizer = VectorQuantizer(K, D)
    z = step_images(0)[0].requires_grad_()
    quantized, _, commitment = quantizer(z)
    assert torch.equal(quantized, z)
    assert commitment.abs().max() == 0
    assert torch.equal(torch.autograd.grad(quantized.sum(), z)[0], torch.ones_like(z))


@pytest.mark.parametrize("parts", [(12,), (5, 7), (1, 1, 10), (4, 4, 4)])
def test_micro_batches_equal_the_whole_step(parts):
    whole, split = (VectorQuantizer(K, D, decay=0.8, dead_threshold=0.5, seed=5) for _ in range(2))
    resets = 0
    for step in range(4):
        z, keys = step_images(step)
        whole(z, keys)
        for z_part, keys_part in zip(z.split(parts), keys.split(parts)):
            split(z_part, keys_part)
        expected, usage = whole.end_step(step), split.end_step(step)
        assert {n: float(v) for n, v in usage.items()} == pytest.approx({n: float(v) for n, v in expected.items()})
        resets += int(usage["codes_reset"])
    assert resets > K  # beyond the first step's
    assert_same_state(state(split), state(whole), rtol=1e-5, atol=1e-6)


def test_padding_images_leave_no_trace():
    plain, padded = (VectorQuantizer(K, D, decay=0.8, dead_threshold=0.5, seed=5) for _ in range(2))
    for step in range(3):
        z, keys = step_images(step)
        plain(z, keys)
        plain.end_step(step)
        garbage = torch.full((3, D, 3, 2), 1e6)
        padded(
            torch.cat([garbage, z]),
            torch.cat([torch.zeros(3, dtype=torch.int64), keys]),
            torch.ones(15) * (torch.arange(15) > 2),
        )
        padded.end_step(step)
    assert_same_state(state(padded), state(plain))


def test_nothing_is_gathered_in_evaluation_or_without_keys():
    quantizer = trained()
    z, keys = step_images(7)
    quantizer(z)
    quantizer.eval()
    quantizer(z, keys)
    assert quantizer.step_counts.sum() == 0
    assert (quantizer.priorities == torch.iinfo(torch.int64).max).all()


def test_a_restored_state_continues_as_if_uninterrupted():
    whole = trained(steps=6, dead_threshold=0.6)
    resumed = VectorQuantizer(K, D, decay=0.8, dead_threshold=0.6, seed=5)
    resumed.load_state_dict(trained(steps=3, dead_threshold=0.6).state_dict())
    for step in range(3, 6):
        resumed(*step_images(step))
        resumed.end_step(step)
    assert_same_state(state(resumed), state(whole), rtol=0, atol=0)


def rank_states(shares):
    """Four steps in which rank r sees shares[r] images; by rank: (state, usage of the last step)."""
    with world("cpu") as here:
        begin, end = sum(shares[: here.rank]), sum(shares[: here.rank + 1])
        vector = VectorQuantizer(K, D, decay=0.8, dead_threshold=0.5, seed=5)
        scalar = FiniteScalarQuantizer([3, 3, 2, 2])
        for step in range(4):
            z, keys = (part[begin:end] for part in step_images(step))
            for quantizer in (vector, scalar):
                quantizer(z, keys)
                usage = quantizer.end_step(step)
                if quantizer is vector:
                    vector_usage = usage
        numpy = {name: tensor.numpy() for name, tensor in vector.state_dict().items()}
        return numpy, [float(v) for v in (*vector_usage.values(), *usage.values())]


def test_two_ranks_equal_one():
    (expected, usage), *_ = run_ranks(1, rank_states, (12,))
    for found, found_usage in run_ranks(2, rank_states, (5, 7)):
        assert found_usage == pytest.approx(usage)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_scalar_quantizer_counts_its_codes():
    quantizer = FiniteScalarQuantizer([3, 3, 2, 2])
    assert quantizer.num_codes == 36
    z, keys = step_images(0)
    weights = (torch.arange(12) < 9).float()
    _, first, _ = quantizer(z[:6], keys[:6], weights[:6])
    _, second, _ = quantizer(z[6:], keys[6:], weights[6:])
    usage = quantizer.end_step(0)
    counts = np.bincount(torch.cat([first, second])[:9].flatten(), minlength=36)
    shares = counts[counts > 0] / counts.sum()
    assert int(usage["codes_used"]) == (counts > 0).sum()
    assert float(usage["perplexity"]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert int(usage["codes_reset"]) == 0
    assert int(quantizer.end_step(1)["codes_used"]) == 0
    torch.testing.assert_close(quantizer.lookup(first).permute(0, 3, 1, 2), quantizer(z[:6])[0])


def test_perplexity_of_known_shares():
    assert float(code_usage(torch.full((16,), 3.0))["perplexity"]) == pytest.approx(16.0, rel=1e-6)
    assert float(code_usage(torch.tensor([5.0, 0.0]))["perplexity"]) == 1.0
