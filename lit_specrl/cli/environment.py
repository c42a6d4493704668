"""Installations that cannot work, told by their cause."""

from importlib import import_module, metadata


def check_torchvision() -> None:
    """Refuse a torchvision that does not fit torch.

    vLLM installs torchvision, torchaudio and torchcodec. Builds for CUDA beside a CPU build of torch cannot be
    imported, and transformers then fails at every model with a message about something else. This library needs none of
    the three.

    Raises:
        ImportError: torchvision is installed and cannot be imported.
    """
    try:
        metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    try:
        import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ImportError(
            f"the installed torchvision does not fit torch {metadata.version('torch')} ({error}), and transformers "
            "cannot load models beside it; lit_specrl needs neither: pip uninstall -y torchvision torchaudio torchcodec"
        ) from error
