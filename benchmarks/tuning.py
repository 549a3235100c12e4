"""Personalisation by scales: subjects that no model here ever saw, tuned and judged.

    python benchmarks/tuning.py --checkpoint W4A8 --checkpoint W8A8 --out build/tuning [--report benchmarks/tuning.json]

tunes, draws and judges dgq's scales (two experts), PEQA, and on the float model DreamBooth and a LoRA of rank 4, which
share objective, batches and noise. A line of JSON for each in rows.jsonl, a strip of pictures beside it; what is there
already is not made again. The report is of the subjects on which no default was chosen: means with intervals over
subjects and, within them, pictures (docs/tuning.md).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from subjects import HELD_OUT, REPORTED, SIDE, SUBJECTS, TRAINING, pictures, write_training

from dgq.checkpoint.reading import read_header
from dgq.evaluation.features import clip_score, efficientnet_available, efficientnet_features
from dgq.evaluation.scorer import Scorer
from dgq.pictures import embedded
from dgq.pictures.generation import Settings, check_size, generate, grid
from dgq.pictures.pipelines import load
from dgq.tuning.apply import load_tuned
from dgq.tuning.objective import Objective, encode_pictures, encode_texts
from dgq.tuning.pictures import read_subject, to_tensor
from dgq.tuning.train import Options, batch_of, generator, tune

# What is asked of a subject: how a prompt goes on, and the background and the style that it names. Training showed none
# of these backgrounds.
ASKED = (
    ("on a blue background", "blue", None),
    ("on a green background", "green", None),
    ("on a purple background", "purple", None),
    ("on a pink background", "pink", None),
    ("on an orange background", "orange", None),
    ("in 3d style", None, "fluent-3d"),
    ("in flat style on a green background", "green", "fluent-flat"),
)
OTHERS = ("cat", "robot")  # beside the subject's class: what should stay as it was
TOGETHER = ("cat", "teapot", "windmill")  # in one file
STRENGTHS = (0.5, 0.75, 1.25)

# Systems of scales: options of `dgq tune`. "even" has all experts at full strength; "together" has three subjects, and
# three times the steps.
SCALES: dict[str, dict[str, Any]] = {
    "tune": {},
    "even": {"high_noise_strength": 1.0},
    "peqa": {"experts": 1, "input_scales": False},
    "prior": {},
    "together": {},
}
# The float baselines run the same objective, batches and noise as `dgq tune`: other parameters are trained.
FLOAT_RATES = {"dreambooth": 2e-4, "lora": 2e-3}
FLOAT = "float"


def prompt_of(name: str) -> str:
    return f"a picture of a {SUBJECTS[name].noun}"


def tune_float(kind: str, pairs: list[tuple[Path, str]], steps: int, rate: float, seed: int) -> tuple[Any, int]:
    """The embedded float pipeline with its UNet trained whole ("dreambooth") or by a LoRA of rank 4 on its attention
    layers ("lora"), and the bytes in float16 of what was trained."""
    pipe = load(None, device="cpu", dtype=torch.float32)
    unet = pipe.unet
    if kind == "lora":
        from peft import LoraConfig

        unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    width, height = check_size(pipe, Settings())
    texts = encode_texts(pipe, [prompt for _, prompt in pairs], width, height)
    items = [
        item
        for number, (folder, _) in enumerate(pairs)
        for item in encode_pictures(pipe, read_subject(folder), number, width, height)
    ]
    objective = Objective(pipe, texts, None, 1.0)
    batch = Options().batch
    for step in range(steps):
        chosen = batch_of(items, step, batch, seed, 0)
        latents, noise, times = objective.draw(chosen, generator(seed, 2, step))
        optimizer.zero_grad(set_to_none=True)
        objective.loss(chosen, batch, latents, noise, times).backward()
        torch.nn.utils.clip_grad_norm_(parameters, Options().max_grad_norm)
        optimizer.step()
    return pipe, 2 * sum(parameter.numel() for parameter in parameters)


class Networks:
    """What tells pictures apart: the scorer, EfficientNet-lite0 where it is installed, and DINO and CLIP from folders.

    Args:
        dino, clip: folders of transformers (DINO ViT-S/16, a CLIP model), or None.

    Raises:
        OSError, ValueError: a folder that transformers cannot load.
    """

    def __init__(self, dino: Path | None = None, clip: Path | None = None) -> None:
        self.scorer, self.clip = Scorer(), clip
        self.found: dict[str, Callable[[Sequence[Image.Image]], torch.Tensor]] = {
            "scorer": lambda images: self.scorer(images)[3]
        }
        if efficientnet_available():
            self.found["efficientnet"] = efficientnet_features
        if dino is not None:
            from transformers import AutoModel

            self._add("dino", dino, AutoModel, lambda model, inputs: model(**inputs).last_hidden_state[:, 0])
        if clip is not None:
            from transformers import CLIPModel

            self._add("clip", clip, CLIPModel, lambda m, i: m.visual_projection(m.vision_model(**i).pooler_output))

    def _add(self, name: str, folder: Path, kind: Any, features: Callable[[Any, Any], torch.Tensor]) -> None:
        from transformers import AutoImageProcessor

        model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        prepare = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

        @torch.no_grad()
        def of(images: Sequence[Image.Image]) -> torch.Tensor:
            return torch.cat([features(model, prepare(images=[image], return_tensors="pt")) for image in images])

        self.found[name] = of

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """{network: unit features (N, d)}."""
        return {
            name: torch.nn.functional.normalize(features(images).float(), dim=1).numpy()
            for name, features in self.found.items()
        }


class Judge:
    """How much pictures look like a subject, and whether they show what was asked for.

    Args:
        name: of the subject.
        networks: that measure it.
        among: the subjects that it is to be told from.
    """

    def __init__(self, name: str, networks: Networks, among: Iterable[str] = REPORTED) -> None:
        self.name, self.networks = name, networks
        self.real = {one: networks(pictures(one, HELD_OUT)) for one in dict.fromkeys([name, *among])}
        self.training = networks(pictures(name, TRAINING))

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], asked: Sequence[tuple[str, str | None, str | None]]
    ) -> dict[str, list[Any]]:
        """{measure: value of each picture, None where its prompt does not ask for it}: a style that is asked for may
        change the likeness, so it is not measured there."""
        found: dict[str, list[Any]] = {}
        plain = [style is None for _, _, style in asked]
        features = self.networks(images)
        for key, own in features.items():
            found[key] = _list((own @ self.real[self.name][key].T).mean(1), plain)
            found[f"{key}_nearest"] = _list((own @ self.training[key].T).max(1), plain)
        to_each = np.stack([(features["scorer"] @ real["scorer"].T).mean(1) for real in self.real.values()])
        found["recognised"] = [int(best == 0) for best in to_each.argmax(0)]
        scorer = self.networks.scorer
        _, styles, backgrounds, _ = scorer(images)
        for key, logits, names, wanted in (
            ("background", backgrounds, scorer.backgrounds, [background for _, background, _ in asked]),
            ("style", styles, scorer.styles, [style for _, _, style in asked]),
        ):
            said = [names[int(row.argmax())] for row in logits]
            found[key] = [None if word is None else int(word == saw) for word, saw in zip(wanted, said, strict=True)]
        if self.networks.clip is not None:
            found["clip_text"] = [score / 100 for score in clip_score(images, prompts, self.networks.clip)]
        return found

    def real_ones(self, vae: Any) -> dict[str, float]:
        """Of held-out pictures: to each other; to what the model's autoencoder makes of them ("_coded"); their nearest
        training picture, and the nearest two of them ("_closest")."""
        found, count = {}, len(HELD_OUT)
        coded = self.networks(through(vae, pictures(self.name, HELD_OUT)))
        for key, real in self.real[self.name].items():
            table, others = real @ real.T, ~np.eye(count, dtype=bool)
            found[key] = float(table[others].mean())
            found[f"{key}_coded"] = float((coded[key] @ real.T)[others].mean())
            found[f"{key}_nearest"] = float((real @ self.training[key].T).max(1).mean())
            found[f"{key}_closest"] = float(table[others].max())
        return found


def _list(values: np.ndarray, where: Sequence[bool] | None = None) -> list[float | None]:
    where = [True] * len(values) if where is None else where
    return [round(float(value), 5) if there else None for value, there in zip(values, where, strict=True)]


@torch.no_grad()
def through(vae: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of SIDE x SIDE pixels as an autoencoder gives them back: the best that a model with it can draw."""
    latents = vae.encode(to_tensor(images, SIDE, SIDE).to(vae.dtype)).latent_dist.mean
    decoded = (vae.decode(latents).sample.float().clamp(-1, 1) + 1) * 127.5
    return [Image.fromarray(one.round().byte().permute(1, 2, 0).numpy()) for one in decoded]


def draw(pipe: Any, prompts: list[str], seeds: int) -> list[Image.Image]:
    """Each prompt once a seed, all prompts of a seed together."""
    images = []
    for seed in range(seeds):
        settings = Settings(seed=1000 * seed, batch=len(prompts)).resolved(embedded.FOLDER)
        images += [picture.image for picture in generate(pipe, prompts, settings)]
    return images


def drift(pipe: Any, case: dict[str, Any], networks: Networks, out: Path, seeds: int) -> dict[str, Any]:
    """How far pictures of the subject's class and of others are from the untuned model's: {"class_NETWORK",
    "other_NETWORK": 1 - cosine of each picture}. The untuned model is drawn first, and keeps its own."""
    found: dict[str, Any] = {}
    own = SUBJECTS[case["subject"]].kind
    for which, kinds in (("class", [own]), ("other", [kind for kind in OTHERS if kind != own])):
        features = networks(draw(pipe, [f"a picture of a {kind}" for kind in kinds], seeds))
        file = out / f"{which}-{case['subject']}-{case['weights']}.npz"
        if case["system"] == "untuned":
            np.savez(file, **features)
        with np.load(file) as before:
            for key, value in features.items():
                found[f"{which}_{key}"] = _list(1 - (value * before[key]).sum(1))
    return found


def memory() -> int:
    """The process's peak of resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one system on one subject, draw and judge."""
    system, weights, name, strength = case["system"], case["weights"], case["subject"], case["strength"]
    out, networks = arguments.out, Networks(arguments.dino, arguments.clip)
    judge, together = Judge(name, networks), system == "together"
    file = out / f"{'all' if together else name}-{system}-{weights}{arguments.label}.safetensors"
    begin, before, size, trained = time.process_time(), memory(), 0, not file.is_file()
    pairs = [(write_training(each, out), prompt_of(each)) for each in (TOGETHER if together else [name])]
    if system in FLOAT_RATES:
        pipe, size = tune_float(system, pairs, arguments.steps, FLOAT_RATES[system], arguments.seed)
    elif system != "untuned" and trained:
        options = {"steps": arguments.steps * len(pairs), "seed": arguments.seed, **json.loads(arguments.options)}
        if system == "prior":
            options["class_prompts"] = (f"a picture of a {SUBJECTS[name].kind}",)
        options.update(SCALES[system])
        tune(arguments.checkpoints[weights], pairs, file, Options(**options))
    spent, peak = time.process_time() - begin, memory() - before
    if system not in FLOAT_RATES:
        pipe = load(None if weights == FLOAT else arguments.checkpoints[weights], device="cpu")
        size = file.stat().st_size if system != "untuned" else 0
    if system in SCALES:
        load_tuned(pipe, file, strength)
    prompts = [f"{prompt_of(name)} {words}" for words, _, _ in ASKED]
    images = draw(pipe, prompts, arguments.seeds)
    found = judge(images, prompts * arguments.seeds, ASKED * arguments.seeds)
    found.update(drift(pipe, case, networks, out, arguments.seeds))
    strip = f"{name}-{system}-{weights}-{strength:g}{arguments.label}.png"
    grid(images, len(ASKED), 1).save(out / strip)
    costs = {"cpu_seconds": round(spent), "peak_bytes": peak} if trained else {}
    return {**case, "pictures": found, "real": judge.real_ones(pipe.vae), "bytes": size, **costs}


def in_a_process(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """`one` in a process of its own, so that memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(one, (case, arguments))


def cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that the report tells, of the systems and subjects that were asked for."""
    subjects, systems = arguments.subjects.split(","), arguments.systems.split(",")
    found: list[dict[str, Any]] = []

    def add(system: str, weights: str, names: Iterable[str] = REPORTED, strength: float = 1) -> None:
        found.extend(
            {"system": system, "weights": weights, "subject": name, "strength": strength, "label": arguments.label}
            for name in subjects
            if system in systems
            and weights in (FLOAT, *arguments.checkpoints)
            and (name in names or name not in REPORTED)
        )

    add("untuned", "W4A8")
    if FLOAT_RATES.keys() & set(systems):
        add("untuned", FLOAT)
    for system in ("tune", "even", "peqa"):
        add(system, "W4A8")
    for system in ("lora", "dreambooth"):
        add(system, FLOAT)
    for strength in STRENGTHS:
        add("tune", "W4A8", strength=strength)
    add("prior", "W4A8")
    add("together", "W4A8", TOGETHER)
    for system in ("untuned", "tune", "peqa"):
        add(system, "W8A8")
    return found


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("system", "weights", "subject", "strength", "label"))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that were written so far."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


RESAMPLES = 4000


class Means:
    """A measure of systems over subjects and pictures, with intervals: resampled are the subjects and, within each,
    its pictures; two systems take the same ones, so that their difference is of pairs.

    Args:
        rows: of all systems.
        seed: of the resampling.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int = 0) -> None:
        self.rows, self.seed = {key_of(row)[:4]: row for row in rows}, seed

    def subjects(self, *systems: tuple[str, str, float]) -> list[str]:
        """Those that all of the systems have."""
        names = dict.fromkeys(key[2] for key in self.rows)
        return [name for name in names if all((s, w, name, k) in self.rows for s, w, k in systems)]

    def drawn(self, system: tuple[str, str, float], names: Sequence[str], measure: str) -> np.ndarray:
        """Means (1 + RESAMPLES,) of a measure over subjects and pictures; the first is of what was measured.

        A measure "real_NAME" is one of the real pictures, which have no pictures within subjects."""
        cells = []
        for name in names:
            row = self.rows[(system[0], system[1], name, system[2])]
            if measure.startswith("real_"):
                cells.append(np.full((1,), row["real"][measure.removeprefix("real_")]))
            elif measure.startswith("copies_"):
                network = measure.removeprefix("copies_")
                limit = row["real"][f"{network}_closest"]
                cells.append(
                    np.array([float(x > limit) for x in row["pictures"][f"{network}_nearest"] if x is not None])
                )
            else:
                cells.append(np.array([x for x in row["pictures"][measure] if x is not None], dtype=float))
        picked = np.random.default_rng(self.seed).integers(len(names), size=(1, RESAMPLES, len(names)))
        within = []
        for number, values in enumerate(cells):
            rng = np.random.default_rng((self.seed, number))
            within.append(values[rng.integers(len(values), size=(*picked.shape[1:], len(values)))].mean(-1))
        resampled = np.take_along_axis(np.stack(within), picked, 0)[0].mean(-1)
        return np.concatenate([[np.mean([values.mean() for values in cells])], resampled])


def interval(values: np.ndarray) -> list[float]:
    """[what was measured, lower and upper end of 95 of 100 resamples]."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return [round(float(value), 4) for value in (values[0], low, high)]


def report(rows: Sequence[dict[str, Any]], steps: int, seeds: int) -> dict[str, Any]:
    """What docs/tuning.md tells of the reported subjects."""
    rows = [row for row in rows if row["subject"] in REPORTED and not row["label"]]
    means, first = Means(rows), ("tune", "W4A8", 1)
    systems = list(dict.fromkeys((row["system"], row["weights"], row["strength"]) for row in rows))
    networks = [key.removesuffix("_nearest") for key in rows[0]["pictures"] if key.endswith("_nearest")]
    measures = list(rows[0]["pictures"]) + [f"copies_{network}" for network in networks]
    told, against = [], []
    for system in systems:
        names = means.subjects(system)
        of = [row for row in rows if (row["system"], row["weights"], row["strength"]) == system]
        costs = {
            key: round(sum(values) / len(values))
            for key in ("cpu_seconds", "peak_bytes", "bytes")
            if (values := [row[key] for row in of if key in row])
        }
        about = {"system": system[0], "weights": system[1], "strength": system[2], "subjects": names, **costs}
        told.append({**about, **{m: interval(means.drawn(system, names, m)) for m in measures}})
        shared = means.subjects(system, first)
        if system == first or not shared:
            continue
        differences = {m: interval(means.drawn(first, shared, m) - means.drawn(system, shared, m)) for m in measures}
        against.append({"of": list(first), "to": list(system), "subjects": shared, **differences})
    return {
        "steps": steps,
        "seeds": seeds,
        "asked": [words for words, _, _ in ASKED],
        "training": len(TRAINING),
        "held_out": len(HELD_OUT),
        "networks": networks,
        "systems": told,
        "against": against,
        "real": {
            key: interval(means.drawn(systems[0], means.subjects(systems[0]), f"real_{key}")) for key in rows[0]["real"]
        },
        "ratios": ratios(means, networks),
        "subjects": [
            {
                "subject": row["subject"],
                "system": row["system"],
                "weights": row["weights"],
                "strength": row["strength"],
                **{key: mean(values) for key, values in row["pictures"].items()},
                **{f"real_{network}": round(row["real"][network], 4) for network in networks},
            }
            for row in rows
        ],
    }


def mean(values: Sequence[float | None]) -> float:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return round(sum(there) / len(there), 4)


def ratios(means: Means, networks: Sequence[str]) -> dict[str, Any]:
    """Likeness of tuned scales: of the way from untuned to real pictures, and to those that the autoencoder made of
    them; and of float DreamBooth's."""
    found: dict[str, Any] = {}
    for weights in ("W4A8", "W8A8"):
        tuned, untuned = ("tune", weights, 1), ("untuned", weights, 1)
        for network in networks:
            if names := means.subjects(tuned, untuned):
                start = means.drawn(untuned, names, network)
                way = means.drawn(tuned, names, network) - start
                for key, real in (("way", f"real_{network}"), ("way_coded", f"real_{network}_coded")):
                    whole = means.drawn(tuned, names, real) - start
                    found[f"{key}_{weights}_{network}"] = interval(way / whole)
            if names := means.subjects(tuned, other := ("dreambooth", FLOAT, 1)):
                of = means.drawn(tuned, names, network) / means.drawn(other, names, network)
                found[f"of_dreambooth_{weights}_{network}"] = interval(of)
    return found


def sheet(out: Path, names: Sequence[str]) -> Image.Image:
    """Of each subject its training pictures, and what the untuned and the tuned checkpoint draw from the first seed."""
    images = []
    for name in names:
        shown = pictures(name, TRAINING)
        images += shown + [Image.new("RGB", (SIDE, SIDE), "white")] * (len(ASKED) - len(shown))
        for system in ("untuned", "tune"):
            with Image.open(out / f"{name}-{system}-W4A8-1.png") as strip:
                gap = 4  # grid's
                pitch = (strip.width - gap) // len(ASKED)
                lefts = [gap + i * pitch for i in range(len(ASKED))]
                images += [strip.crop((left, gap, left + pitch - gap, pitch)) for left in lefts]
    return grid(images, len(ASKED), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="W4A8, W8A8 or both")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--systems", default=f"untuned,{','.join(SCALES)},{','.join(FLOAT_RATES)}")
    parser.add_argument("--subjects", default=",".join(REPORTED))
    parser.add_argument("--steps", type=int, default=Options().steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="{}", help="other options of dgq tune, in JSON")
    parser.add_argument("--label", default="", help="tells such runs from those of the report")
    parser.add_argument("--dino", type=Path, help="folder of a DINO ViT-S/16 of transformers")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model of transformers")
    parser.add_argument("--report", type=Path, help="write it there")
    parser.add_argument("--sheet", type=Path, help="pictures of the first two subjects, there")
    arguments = parser.parse_args()
    arguments.checkpoints = {read_header(folder).recipe.label.split()[-1]: folder for folder in arguments.checkpoint}
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.jsonl"
    for case in cases(arguments):
        if key_of(case) in map(key_of, read_rows(file)):
            continue
        row = in_a_process(case, arguments)
        short = {key: mean(row["pictures"][key]) for key in ("scorer", "background", "style", "recognised")}
        print(json.dumps({**case, **short, "real": row["real"]["scorer"]}), flush=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")
    if arguments.report:
        told = json.dumps(report(read_rows(file), arguments.steps, arguments.seeds), indent=1)
        arguments.report.write_text(told + "\n", encoding="utf-8")
    if arguments.sheet:
        sheet(arguments.out, arguments.subjects.split(",")[:2]).save(arguments.sheet)


if __name__ == "__main__":
    main()
