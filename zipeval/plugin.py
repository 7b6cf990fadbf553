"""Let lmms-eval find zipeval through the entry point `lmms_eval.models`, so that its own command line works as well:

    lmms-eval --model zipeval --model_args model=tiny_llava,method=visionzip,tokens=16 --tasks zipeval_shapes \\
        --include_path "$(python -c 'import zipeval.tasks; print(zipeval.tasks.__path__[0])')"
"""

from __future__ import annotations


def manifests() -> list:
    """Return the manifests to register. lmms-eval asks while it is being imported itself, hence the import in here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="zipeval", chat_class_path="zipeval.evaluation.chat_model.ZipEval"
        )
    ]
