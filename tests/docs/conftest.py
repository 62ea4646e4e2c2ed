"""A folder in which what documents say is run."""

import pytest

from tests.docs.reading import ROOT


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with data/ in it, so that what the documents write does not land in the project.

    data/emoji-delft holds 8 of its 40 pictures: what is shown is the command, not the training.
    """
    (tmp_path / "data/emoji-delft").mkdir(parents=True)
    for source in (ROOT / "data").iterdir():
        if source.name != "emoji-delft":
            (tmp_path / "data" / source.name).symlink_to(source)
    for picture in sorted((ROOT / "data/emoji-delft").glob("*.png"))[::5]:
        for file in (picture, picture.with_suffix(".txt")):
            (tmp_path / "data/emoji-delft" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path
