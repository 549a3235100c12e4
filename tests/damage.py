"""Files of checkpoints, changed by hand."""

import json

from safetensors.torch import load_file, save_file


def edit_config(component, change):
    """Have `change` alter the header in a component's folder."""
    file = component / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_tensors(file, change):
    """Have `change` alter a file's tensors, in a dictionary."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
