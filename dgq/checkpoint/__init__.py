"""The file format of a dgq checkpoint: a diffusers folder whose UNet holds packed integers.

    DIR/model_index.json, scheduler/, text_encoder/, tokenizer/, vae/   as the base model has them
    DIR/unet/config.json                          the float config plus "quantization_config" (see `Header`)
    DIR/unet/diffusion_pytorch_model.safetensors  per integer layer the tensors of `integer.stored.stored_shapes`,
                                                  under the layer's name; everything else as in the float model
    DIR/README.md                                 generated model card

A checkpoint is written to a temporary folder beside its place and renamed: an interrupted save never looks like one.
Reading is strict: a missing, unknown or misshapen tensor is an error that names it, and so are a plan that is not the
float layer's and a value that no calibration writes (`verification`). No pickle is read or written.
"""
