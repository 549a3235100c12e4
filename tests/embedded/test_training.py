"""The training loops: workers agree with plain training, runs resume bit-exactly."""

import copy

import pytest
import torch
from torch import nn

from embedded.common import checkpoints, load_checkpoint, save_checkpoint, warm_constant, warm_cosine
from embedded.parallel import AdamOptions, Parallel, Part
from embedded.train_unet import Settings, Trainer, build_scheduler, snr_weight
from embedded.train_vae import build_vae, edge_loss, vae_loss

SETTINGS = Settings(batch=4, text_steps=3, lr=1e-3)


def run_steps(trainer, count):
    """Some steps, then the losses."""
    losses = [trainer.train_step() for _ in range(count)]
    return losses


def test_workers_match_plain_adamw():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    reference = copy.deepcopy(net)
    batch = {"x": torch.randn(6, 3), "y": torch.randn(6, 1)}

    def loss(module, part):
        return (module(part["x"]) - part["y"]).square().mean()

    options = AdamOptions(clip=0.1)
    parallel = Parallel([Part(net)], lambda part: loss(net, part), batch, 2, options)
    adam = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=options.betas, weight_decay=options.weight_decay)
    for _ in range(5):
        parallel.step(batch, 0.01)
        adam.zero_grad()
        loss(reference, batch).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), options.clip)
        adam.step()
    parallel.close()
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_resume_is_bit_exact(tiny_models, tiny_inputs, tmp_path):
    unet, encoder = tiny_models
    models = [copy.deepcopy((unet, encoder)) for _ in range(2)]
    straight = Trainer(*models[0], tiny_inputs, SETTINGS, tmp_path / "a")
    first = run_steps(straight, 2)
    straight.save()
    rest = run_steps(straight, 3)
    straight.parallel.close()
    resumed = Trainer(*models[1], tiny_inputs, SETTINGS, tmp_path / "a")
    assert resumed.step == 2
    assert run_steps(resumed, 3) == rest
    resumed.parallel.close()
    for name, value in straight.parallel.state().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.parallel.state()[name])), name
    assert first[0] != rest[0]


def test_text_encoder_is_frozen_after_its_steps(tiny_models, tiny_inputs, tmp_path):
    trainer = Trainer(*tiny_models, tiny_inputs, Settings(batch=4, text_steps=1, workers=1), tmp_path)
    before = [p.clone() for p in trainer.encoder.parameters()]
    trainer.train_step()
    moved = [p.clone() for p in trainer.encoder.parameters()]
    trainer.train_step()
    assert any(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moved, trainer.encoder.parameters(), strict=True))


def test_decay_ends_the_run(tiny_models, tiny_inputs, tmp_path):
    trainer = Trainer(*tiny_models, tiny_inputs, Settings(batch=4, decay_steps=3, workers=1), tmp_path)
    trainer.run(minutes=1, checkpoint_minutes=1)
    assert trainer.step == 3
    assert load_checkpoint(tmp_path)["decay_start"] == 0


def test_only_two_checkpoints_are_kept(tmp_path):
    for step in range(4):
        save_checkpoint(tmp_path, step, {"step": step})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000003.pt"]
    assert load_checkpoint(tmp_path) == {"step": 3}


def test_schedules():
    assert warm_constant(0, 10, None, 0) == pytest.approx(0.1)
    assert warm_constant(500, 10, None, 0) == 1.0
    assert warm_constant(15, 10, 10, 10) == pytest.approx(0.5)
    assert warm_cosine(100, 10, 100) == pytest.approx(0.0)


def test_noise_schedule_ends_in_pure_noise():
    alpha_bar = build_scheduler().alphas_cumprod
    assert float(alpha_bar[-1]) == pytest.approx(0.0, abs=1e-6)
    weights = snr_weight(alpha_bar)
    assert float(weights[-1]) == 1.0
    assert bool((weights.diff() >= -1e-6).all())


def test_vae_shapes_and_loss():
    vae = build_vae((8, 8, 8, 16))
    picture = torch.rand(2, 3, 64, 64)
    assert vae.encode(picture).latent_dist.mean.shape == (2, 8, 8, 8)
    loss = vae_loss(vae, picture, torch.randn(2, 8, 8, 8), frozen_encoder=True)
    loss.backward()
    assert vae.encoder.conv_in.weight.grad is None
    assert vae.decoder.conv_in.weight.grad is not None
    assert float(edge_loss(picture, picture + 1).abs()) < 1e-4
