"""Official checkpoints of models that transformers lacks, brought into the Hugging Face layout: `zipeval convert`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ConvNextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaProcessor,
)

from zipeval.checkpoints.prompts import VICUNA_V1
from zipeval.errors import UsageError
from zipeval.models import mini_gemini as family
from zipeval.models._mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
)

SHARD = "5GB"
DECODERS = {
    "mgm": LlamaConfig,
    "mini_gemini": LlamaConfig,
    "mgm_gemma": GemmaConfig,
    "mini_gemini_gemma": GemmaConfig,
}
KNOWN = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
}
CLIP, CONVNEXT = (
    "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower_aux.vision_",
)
TOWERS = {
    "vision_tower": ("vision_model", CLIP),
    "vision_tower_aux": (r"visual\.trunk", CONVNEXT),
}
NAMES = {  # beginnings of our names and of official ones
    "model.vision_tower.": CLIP,
    "model.vision_tower_aux.embeddings.patch_embeddings.": f"{CONVNEXT}stem.0.",
    "model.vision_tower_aux.embeddings.layernorm.": f"{CONVNEXT}stem.1.",
    "model.vision_tower_aux.encoder.stages.": f"{CONVNEXT}stages.",
    "model.patch_info_mining.query.": "model.vlm_uni_query_projector.",
    "model.patch_info_mining.key.": "model.vlm_uni_aux_projector.",
    "model.patch_info_mining.value.": "model.vlm_uni_val_projector.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
# The parts of a ConvNeXt's stage, as transformers and as timm call them.
STAGE = {
    "downsampling_layer": "downsample",
    "layers": "blocks",
    "dwconv": "conv_dw",
    "layernorm": "norm",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
    "layer_scale_parameter": "gamma",
}
# Tensors that are left out: what is computed anew; CLIP's text tower; the head and the
# text tower of open_clip's ConvNeXt.
UNUSED = re.compile(
    r".*\.rotary_emb\.inv_freq|.*\.position_ids"
    r"|(text_model|text_projection|visual_projection|logit_scale)\b.*"
    r"|model\.vision_tower_aux\.vision_head\..*|visual\.head\..*"
    r"|(text|transformer|token_embedding|positional_embedding|ln_final)\b.*"
)
# The chat template of the 2B model: `conv_gemma` of the official code.
GEMMA = (
    "{% for message in messages %}<start_of_turn>{{ {'user': 'user', 'assistant': 'model'}[message.role] }}\n"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<' + part.type + '>\n' }}{% endfor %}"
    "<end_of_turn>\n{{ '<eos>' if message.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Matrices with a row for each token of the vocabulary.
BY_TOKEN = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
# Names of tensors in an error.
SHOWN = 5


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: list[int]

    def read(self) -> torch.Tensor:
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(self.name)


def mini_gemini(source: Path, target: Path, **towers: Path) -> str:
    """Write the Mini-Gemini checkpoint in `source` (YanweiLi/MGM-*) to the new directory `target`, shard by shard.

    Args:
        towers: directories of those that `source` leaves out because they were frozen, with safetensors: `vision_tower`
            is OpenAI's CLIP in the Hugging Face layout, `vision_tower_aux` open_clip's ConvNeXt.

    Returns:
        the `model=` to run it with.

    Raises:
        UsageError: for a source that is not such a checkpoint or is not complete; nothing is left of the target.
    """
    if target.exists():
        raise UsageError(f"{target} exists. Name a new directory, or move it away.")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such directory. Make it first.")
    raw = _settings(source)
    stored = _tensors(source, raw, towers)
    config = _config(source, raw, stored)
    # On the meta device a model has names and shapes, and no weights.
    with torch.device("meta"):
        expected = MiniGeminiForConditionalGeneration(config).state_dict()
    # Gemma's output matrix is that of its embeddings, which is stored once.
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        stored.pop("lm_head.weight", None)
    _check(source, stored, expected)
    processor = _processor(source, config)
    tokenizer = processor.tokenizer
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    # The placeholder of images is a token that the official vocabulary does not have.
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer))
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Beside the target and not in /tmp, so that renaming it copies no gigabytes; and the
    # target is there only once it is complete.
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        unfinished = Path(beside, target.name)
        config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        _keep_legacy(unfinished / "tokenizer_config.json")
        generation.save_pretrained(unfinished)
        _write(stored, expected, config.text_config.vocab_size, unfinished)
        unfinished.rename(target)
    return _model(config)


def _keep_legacy(file: Path) -> None:
    """Write the tokenizer's setting `legacy` (see _processor), which transformers does not save."""
    settings = json.loads(file.read_text())
    settings["legacy"] = True
    file.write_text(json.dumps(settings, indent=2))


def _model(config: MiniGeminiConfig) -> str:
    """Return the `model=` that asks a checkpoint as it was trained: not every one has a Vicuna decoder."""
    if isinstance(config.text_config, GemmaConfig):
        return "mini_gemini_2b"
    if config.image_grid > 1:
        return "mini_gemini_hd"
    # Vicuna has 32 layers at 7B, and 40 at 13B.
    if config.text_config.num_hidden_layers == 40:
        return "mini_gemini_13b"
    return "mini_gemini"


def official(name: str) -> str:
    """Return what a tensor of ours is called in official checkpoints."""
    ours, theirs = next(pair for pair in NAMES.items() if name.startswith(pair[0]))
    rest = name.removeprefix(ours)
    if theirs == f"{CONVNEXT}stages.":
        rest = ".".join(STAGE.get(part, part) for part in rest.split("."))
    return theirs + rest


def _settings(source: Path) -> dict:
    """Return the content of the official config.json.

    Raises:
        UsageError: for another kind of checkpoint, and for a setting whose meaning is not known here.
    """
    try:
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{source}: its config.json cannot be read ({error}). Give a copy of YanweiLi/MGM-7B."
        ) from error
    if kind not in DECODERS or "image_size_aux" not in raw or "aux_config" in raw:
        raise UsageError(
            f"{source} holds a {kind!r} checkpoint that is not an official one of Mini-Gemini "
            f"({', '.join(DECODERS)}). If it is in the Hugging Face layout, use it with model.path={source}."
        )
    for name in ("image_size_aux", "image_grid"):
        if not isinstance(raw.get(name, 1), int):
            raise UsageError(
                f"{source}: its config.json says {name}={raw[name]!r}, which is no whole number."
            )
    for name, value in {**KNOWN, "image_global": raw.get("image_grid", 1) > 1}.items():
        if raw.get(name, value) != value:
            raise UsageError(
                f"{source}: its config.json says {name}={raw[name]!r}, and only {value!r} is known."
            )
    return raw


def _tensors(source: Path, raw: dict, towers: dict[str, Path]) -> dict[str, Stored]:
    """Return all tensors that are there, by their official names.

    Raises:
        UsageError: for a tower that is there twice, or not at all.
    """
    stored = _stored(source)
    for tower, (theirs, ours) in TOWERS.items():
        is_included = any(name.startswith(ours) for name in stored)
        directory = towers.get(tower)
        if is_included and directory:
            raise UsageError(
                f"{tower}={directory}: {source} has its own. Leave {tower}= out."
            )
        if directory:
            # A tower by itself names its tensors without their place in Mini-Gemini.
            for name, tensor in _stored(directory).items():
                stored[re.sub(rf"^{theirs}\.", ours, name)] = tensor
        elif not is_included:
            original = raw.get(f"mm_{tower}")
            raise UsageError(
                f"{source} is without {original}, as it was not trained. Fetch it too: {tower}=DIR."
            )
    for name in filter(UNUSED.fullmatch, list(stored)):
        del stored[name]
    return stored


def _stored(directory: Path) -> dict[str, Stored]:
    """Return what the safetensors files of a directory hold."""
    stored = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                # The header alone tells the shapes: no weight is read yet.
                for name in list(tensors.keys()):
                    shape = tensors.get_slice(name).get_shape()
                    stored[name] = Stored(file, name, shape)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} is damaged: {error}. Fetch it again.") from error
    pickled = next(directory.glob("*.bin"), None)
    if not stored and pickled:
        raise UsageError(
            f"{pickled} is pickled, and loading it could run what is in it. To turn it into safetensors without that: "
            f'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in torch.load('
            f"'{pickled}', weights_only=True).items()}}, '{pickled.with_suffix('.safetensors')}')\""
        )
    if not stored:
        raise UsageError(
            f"{directory}: no *.safetensors there. Give a directory with weights."
        )
    return stored


def _config(source: Path, raw: dict, stored: dict[str, Stored]) -> MiniGeminiConfig:
    """Return a configuration of what the official config.json says, and of the towers' shapes."""

    def count(beginning: str) -> int:
        """Return how many layers or stages have names that begin like this."""
        numbers = set()
        for name in stored:
            if name.startswith(beginning):
                numbers.add(name.removeprefix(beginning).partition(".")[0])
        return len(numbers)

    text = DECODERS[raw["model_type"]]
    known = {field.name for field in fields(text)} - {"architectures"}
    # The fields have the rotary settings under one name, which was two.
    known |= {"rope_theta", "rope_scaling"}
    numbers = range(count(f"{CONVNEXT}stages."))
    stages = [f"{CONVNEXT}stages.{number}.blocks." for number in numbers]
    try:
        width, _, patch, _ = stored[f"{CLIP}embeddings.patch_embedding.weight"].shape
        # One position is that of the class token, and the others are a square.
        positions = stored[f"{CLIP}embeddings.position_embedding.weight"].shape[0]
        first_layer = stored[f"{CLIP}encoder.layers.0.mlp.fc1.weight"]
        config = MiniGeminiConfig(
            text_config=text(**{k: v for k, v in raw.items() if k in known}),
            vision_config=CLIPVisionConfig(
                hidden_size=width,
                patch_size=patch,
                image_size=patch * isqrt(positions - 1),
                intermediate_size=first_layer.shape[0],
                num_hidden_layers=count(f"{CLIP}encoder.layers."),
                # A head is 64 wide in all of OpenAI's models.
                num_attention_heads=width // 64,
            ),
            aux_config=ConvNextConfig(
                depths=[count(stage) for stage in stages],
                hidden_sizes=[stored[f"{stage}0.gamma"].shape[0] for stage in stages],
                num_stages=len(stages),
            ),
            image_size_aux=raw["image_size_aux"],
            image_grid=raw.get("image_grid", 1),
            vision_feature_layer=raw.get("mm_vision_select_layer", -2),
            dtype=raw.get("torch_dtype"),
            architectures=[MiniGeminiForConditionalGeneration.__name__],
        )
    except KeyError as error:
        raise UsageError(
            f"{source}: 1 tensor or more is missing ({error.args[0]}). Fetch it again."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{source}: its config.json is not one of Mini-Gemini ({error}). Fetch it again."
        ) from error
    config.image_seq_length = family.visual_tokens(config.to_dict())
    return config


def _check(
    source: Path, stored: dict[str, Stored], expected: dict[str, torch.Tensor]
) -> None:
    """Raise UsageError unless every tensor of the model is there in its shape, and no other."""
    expected_shapes = {}
    for name, tensor in expected.items():
        expected_shapes[official(name)] = list(tensor.shape)
    stored_shapes = {name: tensor.shape for name, tensor in stored.items()}
    missing = expected_shapes.keys() - stored_shapes.keys()
    unexpected = stored_shapes.keys() - expected_shapes.keys()
    different = {
        name
        for name in expected_shapes.keys() & stored_shapes.keys()
        if expected_shapes[name] != stored_shapes[name]
    }
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": different,
    }
    complaints = []
    for problem, names in problems.items():
        if names:
            first = sorted(names)[:SHOWN]
            # A checkpoint of another model may have hundreds of other tensors.
            more = ["..."] if len(names) > SHOWN else []
            complaints.append(f"{len(names)} {problem} ({', '.join(first + more)})")
    if complaints:
        raise UsageError(
            f"{source}: of its tensors and its towers', {'; '.join(complaints)}. Fetch them again."
        )


def _processor(source: Path, config: MiniGeminiConfig) -> LlavaProcessor:
    """Return the processor, whose tokenizer has an `<image>` token.

    Official code encodes the text behind an image apart, so that Llama's tokenizer puts a space before it; `legacy`
    makes it do so behind every special token. Gemma's does not know it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config.text_config, local_files_only=True, legacy=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"{source}: its tokenizer cannot be loaded ({reason}). Put a tokenizer.json and its "
            "tokenizer_config.json there: of llava-hf/llava-1.5-7b-hf for Vicuna, of google/gemma-2b-it for Gemma."
        ) from error
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = (
        tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    )
    size = config.image_size_aux
    images = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    template = GEMMA if isinstance(config.text_config, GemmaConfig) else VICUNA_V1
    return LlavaProcessor(
        images,
        tokenizer,
        chat_template=template,
        **family.placeholders(config.to_dict()),
    )


def _write(
    stored: dict[str, Stored],
    expected: dict[str, torch.Tensor],
    rows: int,
    directory: Path,
) -> None:
    """Write the weights in shards, of which one at a time is in memory.

    Args:
        rows: of the embeddings and of the output matrix in the new checkpoint.
    """
    plan = split_torch_state_dict_into_shards(expected, max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: stored[official(name)].read() for name in names}
        for name in shard.keys() & BY_TOKEN:
            shard[name] = _with_rows(shard[name], rows)
        save_file(shard, directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2)
        )


def _with_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a matrix (tokens, width) that is grown to so many rows.

    A new row is the mean of the others, so that the logit of a new token is never the highest.
    """
    mean = matrix.float().mean(0).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - len(matrix), -1)])
