"""``load``: a model from a folder, also one whose layers differ, share experts, keep their weights packed, or run other
experts than their routers choose."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressor.building import building
from compressor.families.plausible import require_plausible
from compressor.packed.settings import stated_settings
from compressor.routing import put_before
from moescope.errors import ModelError


def load(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu", **options: Any
) -> Any:
    """The model in a folder, ready to be used; by the library's own classes, and never with a checkpoint's own code.

    Checkpoints of compressed-tensors are unpacked here, matrix by matrix, each by the group that names it; the model is
    dense. The library's own way takes one group for all experts, and gets other weights where their widths differ.

    Args:
        path: folder that holds config.json and weights.
        dtype: of the weights; ``auto`` = as stored.
        device: where the model goes.
        options: of the library's ``from_pretrained``.

    Raises:
        ModelError: no such folder, a checkpoint that brings its own code, does not load, or lacks weights; one line.
    """
    path = Path(path)
    stated = _config_file(path)
    if options.pop("trust_remote_code", False):
        raise ModelError(f"{path} may bring code of its own, which is never run: leave out trust_remote_code")
    with _as_model_error(path):
        config = options.pop("config", None) or _library_config(path, stated)
        with building(config):
            settings = {"config": config, "dtype": dtype, "local_files_only": True, **options}
            # Of other shapes, too: that way the message can name the weight. None of them is kept.
            settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            if stated_settings(stated) is None:
                model, info = _class(config, stated).from_pretrained(path, **settings)
            else:
                model, info = _unpacked(path, _class(config, stated), settings)
    _require_whole(path, info)
    with _as_model_error(path):
        put_before(model)
    return (model if "device_map" in options else model.to(device)).eval()


def _unpacked(path: Path, kind: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model of packed weights, from their values, and what the library says of its loading."""
    from transformers import GenerationConfig

    from compressor.packed.loading import dense_state

    config = copy.deepcopy(settings["config"])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with dense_state(path, config.model_type) as state:
        model, info = kind.from_pretrained(None, **{**settings, "config": config, "state_dict": state})
    model.config.name_or_path = model.name_or_path = str(path)
    if (path / "generation_config.json").is_file() and "generation_config" not in settings:
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, info


def require_loadable(config: Mapping[str, Any]) -> None:
    """Build the model of a configuration, as it stands in config.json, without memory for its weights.

    Raises:
        ModelError: :func:`load` could not build it.
    """
    with tempfile.TemporaryDirectory() as folder, _as_model_error(f"a {config.get('model_type')} of this plan"):
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        loaded = _library_config(folder, config)
        with building(loaded), torch.device("meta"):
            put_before(_class(loaded, config)._from_config(loaded))


def _require_whole(path: Path, info: dict[str, Any]) -> None:
    """Refuse weights that the checkpoint does not have: they would be random."""
    other = sorted(info.get("mismatched_keys") or ())
    if other:
        name, stored, wanted = other[0]
        raise ModelError(
            f"{path} holds {name} as {list(stored)} where its configuration wants {list(wanted)}"
            + (f", and {len(other) - 1} more" if len(other) > 1 else "")
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}: the checkpoint is incomplete or of another"
            " class, and they would be random"
        )


def _config_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "it holds no config.json" if isinstance(error, OSError) else f"its config.json is damaged: {error}"
        raise ModelError(f"{path} is no folder with a checkpoint: {why}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no folder with a checkpoint: its config.json holds no settings")
    require_plausible(content, str(path / "config.json"))
    return content


def _library_config(path: str | Path, stated: Mapping[str, Any]) -> Any:
    """The configuration by the library's own class, whatever code the checkpoint brings beside it.

    Raises:
        ModelError: the library has no class of that name.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if "auto_map" in stated and stated.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"a {stated.get('model_type')} is no class of the library, and code of its own is never run: load a"
            " checkpoint of a library class"
        )
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _class(config: Any, stated: Mapping[str, Any]) -> Any:
    """The class that the configuration names, where the library has it; else the language model of that family."""
    import transformers

    for name in stated.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


@contextmanager
def _as_model_error(name: Path | str) -> Iterator[None]:
    """Whatever the library makes of a broken checkpoint, the user reads one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{name} cannot be loaded: {text[:300] or type(error).__name__}") from error
