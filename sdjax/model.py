"""A model in hand: its config, its parameters and its tokenizers; load and save."""

import dataclasses
import functools
import os
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from sdjax import cache, parallel, weights
from sdjax.config import ModelConfig, PredictionType, TextEncoderConfig
from sdjax.errors import SdjaxError
from sdjax.text import Tokenizer, read_tokenizer_files
from sdjax.typing import Params

BUNDLED = "emoji"
"""Name of the model that comes with the package."""

ASSETS = Path(__file__).parent / "assets"

TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What `load` returns and `generate` takes.

    Attributes:
        config: describes every component.
        params: by component, "unet", "vae", "text_encoder", "text_encoder_2".
        tokenizer_files: by component, "tokenizer" and "tokenizer_2", the files of each
            by name.
        path: where it was loaded from.
        variant: of the folder's files that were read.
    """

    config: ModelConfig
    params: Params
    tokenizer_files: dict[str, dict[str, bytes]]
    path: str
    variant: str | None = None

    @functools.cached_property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """One for each text tower, by the tower's name.

        Raises:
            SdjaxError: if the model came without them.
        """
        return {
            name: self._tokenizer(name, tower)
            for name, tower in self.config.text_encoders.items()
        }

    def _tokenizer(self, name: str, tower: TextEncoderConfig) -> Tokenizer:
        files = self.tokenizer_files.get(TOKENIZER_OF[name])
        if not files:
            raise SdjaxError(
                f"{self.path} has no {TOKENIZER_OF[name]}: pass tokenizer= (on the "
                "command line --tokenizer), a folder with vocab.json and merges.txt"
            )
        tokenizer = Tokenizer.from_files(
            files,
            max_length=tower.max_length,
            pad_token_id=tower.pad_token_id,
            source=self.path,
        )
        if tokenizer.vocab_size > tower.vocab_size:
            raise SdjaxError(
                f"the tokenizer of {self.path} has {tokenizer.vocab_size} tokens, but "
                f"its {name} knows {tower.vocab_size}: they belong to different models"
            )
        return tokenizer

    def replicated(self, mesh: Mesh) -> Params:
        """The parameters on every device of `mesh`; kept until another mesh is used."""
        if mesh not in self._replicas:
            self._replicas.clear()
            self._replicas[mesh] = parallel.replicate(self.params, mesh)
        return self._replicas[mesh]

    @functools.cached_property
    def _replicas(self) -> dict[Mesh, Params]:
        return {}

    @property
    def name(self) -> str:
        """The last part of the path, without a file's extension."""
        name = os.path.basename(os.path.normpath(self.path))
        return name.removesuffix(".safetensors").removesuffix(".ckpt")

    @functools.cached_property
    def hash(self) -> str:
        """What tells this model's weights from others'.

        Reads them all, unless it is known from before and no file has changed.
        """
        return cache.remembered(
            self.path,
            f"hash of variant {self.variant}",
            lambda: weights.describe(self.path, variant=self.variant).hash,
        )


def load(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    variant: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction_type: PredictionType | None = None,
) -> Model:
    """Loads a Stable Diffusion model; nothing in it is executed.

    Args:
        path: a diffusers folder, a single file in the original layout
            (.safetensors or .ckpt), a folder that `save` wrote with Orbax, or the name
            of the bundled model, "emoji", where nothing here is called so.
        dtype: to store the parameters in; None keeps the file's own.
        variant: of a diffusers folder's weight files, as "fp16".
        tokenizer: folder of a CLIP tokenizer, for models that come without one.
        prediction_type: for single files of SD 2, whose tensors do not tell.

    Raises:
        SdjaxError: if the path is no such model, or is damaged.
    """
    path = locate(path)
    given = None if tokenizer is None else read_tokenizer_files(tokenizer)
    checkpoint = weights.read(
        path,
        dtype=dtype,
        variant=variant,
        prediction_type=prediction_type,
        needs_tokenizers=given is None,
    )
    files = dict(checkpoint.tokenizers)
    if given is not None:
        files.update(
            {TOKENIZER_OF[name]: given for name in checkpoint.config.text_encoders}
        )
    return Model(checkpoint.config, checkpoint.params, files, path, variant)


def locate(path: str | os.PathLike) -> str:
    """Where a model is: the path itself, or that of the bundled model it names."""
    path = os.fspath(path)
    if path == BUNDLED and not os.path.lexists(path):
        return str(ASSETS / BUNDLED)
    return path


@functools.cache
def bundled() -> Model:
    """The model that comes with the package, loaded once."""
    return load(ASSETS / BUNDLED)


def save(
    model: Model,
    path: str | os.PathLike,
    *,
    format: weights.Format = "diffusers",
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a model whole or not at all; never over what is there.

    Args:
        model: as `load` returned it.
        path: of a new folder, or of a new file for "single-file".
        format: "diffusers", "single-file" (the original layout) or "orbax".
        dtype: to store the parameters in; None keeps theirs.

    Raises:
        SdjaxError: if the path exists or cannot be written.
    """
    weights.write(
        os.fspath(path),
        model.config,
        model.params,
        model.tokenizer_files,
        format=format,
        dtype=dtype,
    )
