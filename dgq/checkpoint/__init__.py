"""The file format of a dgq checkpoint: a diffusers folder whose network holds packed integers.

    DIR/model_index.json, scheduler/, text_encoder/, tokenizer/, vae/   as the base model has them; but a VAE that
                                                       is quantized is as COMPONENT
    DIR/COMPONENT/config.json                          the float config plus "quantization_config" (see `Header`)
    DIR/COMPONENT/diffusion_pytorch_model.safetensors  per integer layer the tensors of `stored.stored_shapes`,
                                                       under the layer's name; everything else as in the float model
    DIR/README.md                                 generated model card

A checkpoint is written to a temporary folder beside its place and renamed: an interrupted save never looks like one.
Reading is strict: a missing, unknown or misshapen tensor is an error that names it, and so are a plan that is not the
float layer's and a value that no calibration writes (`verification`). No pickle is read or written.
COMPONENT is what the network's family (`dgq.family`) calls it in its pipelines.
"""
