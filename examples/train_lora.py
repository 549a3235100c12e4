"""A LoRA trained beside packed weights (needs peft): python examples/train_lora.py CHECKPOINT PICTURE PROMPT [STEPS]"""

import sys

import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import dgq

checkpoint, picture, prompt, *rest = sys.argv[1:]  # of a Stable Diffusion 1.x or 2.x, or the embedded model
steps = int(rest[0]) if rest else 100
pipe = dgq.load(checkpoint)
unet, scheduler = pipe.unet, pipe.scheduler
for part in (unet, pipe.vae, pipe.text_encoder):
    part.requires_grad_(False)
layers = ["to_q", "to_k", "to_v", "to_out.0"]
unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=layers), "subject")
unet.enable_gradient_checkpointing()  # activations are computed twice and take less memory
trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)

generator = torch.Generator().manual_seed(0)
side = unet.config.sample_size * pipe.vae_scale_factor
pixels = pipe.image_processor.preprocess(Image.open(picture).convert("RGB"), side, side).to(unet.device, unet.dtype)
with torch.no_grad():
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    text, _ = pipe.encode_prompt(prompt, unet.device, 1, False)

unet.train()
for step in range(steps):
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    t = torch.randint(scheduler.config.num_train_timesteps, (1,), generator=generator).to(latents.device)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, t) if velocity else noise
    noisy = scheduler.add_noise(latents, noise, t)
    loss = (unet(noisy, t, text).sample - target).square().mean()  # gradients pass through the frozen layers
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {float(loss.detach()):.4f}")
unet.eval()

learned = get_peft_model_state_dict(unet, adapter_name="subject")
pipe.save_lora_weights("lora", unet_lora_layers=learned)  # load_lora_weights reads it, into the float model too
pipe(prompt, num_inference_steps=20, generator=torch.Generator().manual_seed(1)).images[0].save("with.png")
pipe.unload_lora_weights()
pipe(prompt, num_inference_steps=20, generator=torch.Generator().manual_seed(1)).images[0].save("without.png")
print("lora/pytorch_lora_weights.safetensors, with.png, without.png")
