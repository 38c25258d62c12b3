"""The house stands as it is drawn: arrows between rooms run one way, and README shows the rooms that there are."""

from __future__ import annotations

from graphlib import TopologicalSorter

from house import FACES, ROOMS, ROOT, files, imports_of, readme_with_tree, room_of


def test_no_room_imports_a_higher_one():
    known = files()
    wrong = [
        f"{name} -> {other}"
        for name, path in known.items()
        if (room := room_of(path)) not in FACES
        for other in imports_of(path, known)
        if (own := room_of(known[other])) not in FACES and ROOMS.index(own) > ROOMS.index(room)
    ]
    assert not wrong


def test_the_library_is_there_without_any_room_above_the_tuner():
    known = files()
    rooms = {room_of(known[other]) for other in imports_of(known["diablo"], known)} - set(FACES)
    assert rooms <= set(ROOMS[: ROOMS.index("diablo/tuner") + 1])


def test_no_files_import_each_other_in_a_circle():
    known = files()
    # A package's face only hands on what its files define, and these may take names from one another.
    faces = {name for name, path in known.items() if path.name == "__init__.py"}
    arrows = {name: imports_of(path, known) - faces for name, path in known.items() if name not in faces}
    assert len(list(TopologicalSorter(arrows).static_order())) == len(arrows)


def test_the_tree_in_the_readme_is_made_from_the_docstrings():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_with_tree(), "run python tests/house.py"
