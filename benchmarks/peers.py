"""How other quantizers do at the same bits, on the same pictures: the peers' table of docs/fidelity.md.

    python benchmarks/peers.py --work DIR [--prompts 64] [--only TEXT] [--out FILE.json]

Beside dgq's checkpoints (made as `benchmarks/fidelity.py` makes them, in the same DIR): torchao, optimum-quanto and
sdnq, each as its documentation says, on the float UNet in memory; those that are not installed are left out. Prompts
are those of `dgq eval`, so the emoji scorer can say whether pictures still show what was asked. sdnq is under the GPL
and is no dependency of dgq.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fidelity import checkpoint, pictures, say
from torch import nn

from dgq.calibration.run import Options
from dgq.evaluation.items import Item, items
from dgq.evaluation.scorer import Scorer
from dgq.pictures import embedded
from dgq.pictures.fidelity import compare
from dgq.pictures.generation import Picture, Settings, generate
from dgq.pictures.pipelines import load, resolve
from dgq.pictures.prompts import calibration_prompts
from dgq.recipe import Recipe

FIRST_SEED = 40_000
CALIBRATION_PROMPTS = 16
# Every layer; and, as torchao has it, convolutions in float.
FLOAT_CONVOLUTIONS = tuple(
    (pattern, 0) for pattern in ("*.conv", "*.conv?", "*.conv_shortcut", "*.proj_in", "*.proj_out")
)
RECIPES = tuple(
    (f"dgq W{wbits}A8{', linear layers' if overrides else ''}", Recipe(wbits=wbits, abits=8, overrides=overrides))
    for wbits in (8, 4)
    for overrides in ((), FLOAT_CONVOLUTIONS)
)
KEPT_FLOAT = ("conv_in", "conv_out")  # as dgq keeps them


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another quantizer.

    Attributes:
        name: with the bits of weights and activations; A32 are float activations.
        package: what has to be installed.
        quantize: changes a pipeline in place, and may draw with it to calibrate.
    """

    name: str
    package: str
    quantize: Callable[[Any], None]


def _torchao(config: str, **options: Any) -> Callable[[Any], None]:
    def run(pipe: Any) -> None:
        from torchao import quantization

        quantization.quantize_(pipe.unet, getattr(quantization, config)(**options), _large_linear)

    return run


def _large_linear(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear)


def _torchao_int4(pipe: Any) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(pipe.unet, IntxWeightOnlyConfig(torch.int4, PerGroup(32)), _large_linear)


def _quanto(weights: str, activations: str | None = None) -> Callable[[Any], None]:
    def run(pipe: Any) -> None:
        from optimum import quanto

        types = {"weights": getattr(quanto, weights), "activations": activations and getattr(quanto, activations)}
        quanto.quantize(pipe.unet, **types, exclude=list(KEPT_FLOAT))
        if activations:
            settings = Settings(seed=0).resolved(embedded.FOLDER)
            with quanto.Calibration():
                generate(pipe, calibration_prompts(embedded.FOLDER, CALIBRATION_PROMPTS), settings)
        quanto.freeze(pipe.unet)

    return run


def _sdnq(weights: str, products: bool) -> Callable[[Any], None]:
    def run(pipe: Any) -> None:
        from sdnq import sdnq_post_load_quant

        pipe.unet = sdnq_post_load_quant(
            pipe.unet,
            weights_dtype=weights,
            quant_conv=True,
            use_quantized_matmul=products,
            use_quantized_matmul_conv=products,
            modules_to_not_convert=list(KEPT_FLOAT),
        )

    return run


PEERS = (
    Peer("torchao int8 W8A8 (linear layers)", "torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    Peer("torchao int8 W8A32 (linear layers)", "torchao", _torchao("Int8WeightOnlyConfig")),
    Peer("torchao int4 W4A32 (linear layers)", "torchao", _torchao_int4),
    Peer("quanto W8A8", "optimum.quanto", _quanto("qint8", "qint8")),
    Peer("quanto W8A32", "optimum.quanto", _quanto("qint8")),
    Peer("quanto W4A8", "optimum.quanto", _quanto("qint4", "qint8")),
    Peer("quanto W4A32", "optimum.quanto", _quanto("qint4")),
    Peer("sdnq int8 W8A8", "sdnq", _sdnq("int8", True)),
    Peer("sdnq int8 W8A32", "sdnq", _sdnq("int8", False)),
    Peer("sdnq int4 W4A8", "sdnq", _sdnq("int4", True)),
    Peer("sdnq int4 W4A32", "sdnq", _sdnq("int4", False)),
)


def installed(package: str) -> bool:
    """Whether a package, or a package inside a namespace, can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def top1(scorer: Scorer, wanted: list[Item], made: list[Picture]) -> float:
    """Percent of pictures in which the scorer sees the concept that was asked for."""
    concepts = scorer([picture.image for picture in made])[0].argmax(1).tolist()
    right = [scorer.concepts[one] == item.concept for one, item in zip(concepts, wanted, strict=True) if item.concept]
    return 100 * sum(right) / len(right)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for dgq's checkpoints")
    parser.add_argument("--prompts", type=int, default=64, help="labelled prompts (default 64)")
    parser.add_argument("--only", default="", help="only the systems whose name holds this text")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    model = resolve(None)
    wanted = items(model, str(args.prompts))
    prompts = [item.prompt for item in wanted]
    settings = Settings(seed=FIRST_SEED, batch=8).resolved(model)
    options = Options(
        prompts=CALIBRATION_PROMPTS,
        steps=settings.steps,
        record_steps=settings.steps,  # the pictures that others calibrate with, too
        guidance=settings.guidance,
        evaluate=0,
        overwrite=True,
        vae="float",  # networks are compared
    )
    scorer = Scorer()
    reference = pictures(load(model, dtype=torch.float32), prompts, settings, "float32")
    rows: list[dict[str, Any]] = [{"system": "float32", "top1": top1(scorer, wanted, reference)}]

    def measure(name: str, make: Callable[[], Any]) -> None:
        if args.only not in name:
            return
        try:
            made = pictures(make(), prompts, settings, name)
        except Exception as error:
            say(f"{name}: {type(error).__name__}: {error}")
            rows.append({"system": name, "error": f"{type(error).__name__}: {error}"})
            return
        rows.append({"system": name, **compare(reference, made), "top1": top1(scorer, wanted, made)})

    def quantized(peer: Peer) -> Any:
        pipe = load(model, dtype=torch.float32)
        with torch.no_grad():
            peer.quantize(pipe)
        return pipe

    measure("bfloat16", lambda: load(model, dtype=torch.bfloat16))
    for name, recipe in RECIPES:
        work = args.work / "linear-layers" if recipe.overrides else args.work
        folder = checkpoint(model, recipe, work, options, embedded.NAME)
        measure(name, lambda folder=folder: load(folder, dtype=torch.float32))  # type: ignore[misc]
    for peer in PEERS:
        if installed(peer.package):
            measure(peer.name, lambda peer=peer: quantized(peer))  # type: ignore[misc]
        else:
            say(f"{peer.name}: {peer.package} is not installed")
    print("| system | PSNR (dB) | latent MSE | latent SQNR (dB) | top-1 (%) |\n|---|---|---|---|---|")
    for row in rows:
        cells = ["-"] * 3
        if "psnr_db" in row:
            cells = [f"{row['psnr_db']:.2f}", f"{row['latent_mse']:.2e}", f"{row['latent_sqnr_db']:.2f}"]
        print(f"| {row['system']} | {' | '.join(cells)} | {row.get('top1', float('nan')):.1f} |")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
