import pytest


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A working directory without data, and an empty hub cache without a network."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path
