"""Entroformer: transformer entropy models for learned image compression that you can look inside.

The names below are loaded on first use, so `import entroformer_lib` is quick although torch and CompressAI are not.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "build_model": "entroformer_lib.entroformer",
    "Entroformer": "entroformer_lib.entroformer",
    "EntroformerConfig": "entroformer_lib.models.config",
    "load_model": "entroformer_lib.weights.zoo",
    "list_models": "entroformer_lib.weights.zoo",
    "encode": "entroformer_lib.codec.codec",
    "decode": "entroformer_lib.codec.codec",
    "capture": "entroformer_lib.inspection.capture",
    "intervene": "entroformer_lib.inspection.capture",
    "BitstreamError": "entroformer_lib.errors",
    "UserError": "entroformer_lib.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'entroformer_lib' has no attribute '{name}'")
