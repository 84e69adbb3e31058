"""The registry agrees with itself, with what is made from it, and with every place that repeats one of its facts."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book/_ext"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book/_tools"))
import new_paper
import registry

ROOT = registry.ROOT

PARTS = {
    "classification": 7,
    "similarity": 7,
    "optimization": 7,
    "language": 5,
    "robustness": 5,
    "generalization": 6,
    "decisions": 4,
    "generative": 4,
    "vision": 5,
    "compression": 4,
    "explanation": 3,
}
CHAPTER_HEADINGS = [
    "The question",
    "Setting",
    "Derivation",
    "The code",
    "A picture that explains",
    "What the lab shows",
    "Pitfalls",
    "Exercises",
    "Connections",
]
LAB_HEADINGS = [
    "The question",
    "Before you run: what do you expect?",
    "Set-up",
    "Profiles",
    "Method and baselines",
    "Experiment",
    "Pictures",
    "Explorer",
    "Claims",
    "Your turn",
]
PAPERS = list(registry.papers())
LABS = [paper for paper in PAPERS if paper.exists("lab")]


@pytest.fixture
def root(tmp_path):
    """A project with the registry and the two files that the tools read, and no room yet."""
    (tmp_path / "book").mkdir()
    shutil.copy(ROOT / "book/papers.yml", tmp_path / "book")
    (tmp_path / "_config.yml").write_text("repository:\n  url: https://github.com/someone/fork/\n  branch: trunk\n")
    (tmp_path / "README.md").write_text(
        "# Title\n\nBefore.\n\n<!-- papers:begin -->\nold\n<!-- papers:end -->\n\nAfter.\n"
    )
    return tmp_path


def headings(path):
    """The headings of the second level, in order, of a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^## (.+)$", text, re.M)


# The registry


def test_parts_and_numbers_of_papers():
    assert [(part.part, len(part.papers)) for part in registry.load()] == list(PARTS.items())


def test_a_line_reader_finds_the_same_papers_in_the_same_order():
    part, pairs = None, []
    for line in (ROOT / "book/papers.yml").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\s*-?\s*part:\s*['\"]?([\w-]+)", line):
            part = match[1]
        elif match := re.match(r"\s*-?\s*slug:\s*['\"]?([\w-]+)", line):
            pairs.append((part, match[1]))
    assert pairs == [(paper.part, paper.slug) for paper in PAPERS]


@pytest.mark.parametrize("key", ["slug", "title", "arxiv", "cite"])
def test_no_two_papers_share(key):
    values = [getattr(paper, key) for paper in PAPERS]
    assert sorted(set(values)) == sorted(values)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_facts_have_the_right_form(paper):
    assert paper.slug.isidentifier() and paper.slug == paper.slug.lower()
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert paper.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", paper.code)
    assert isinstance(paper.year, int) and 2000 + int(paper.arxiv[:2]) <= paper.year <= 2000 + int(paper.arxiv[:2]) + 3
    assert isinstance(paper.venue, str) and paper.venue and not re.search(r"\d{4}", paper.venue)
    assert paper.authors and all(len(author.split()) > 1 for author in paper.authors)


def test_bibliography_agrees_with_the_registry():
    entries = {}
    for entry in re.split(r"^@\w+", (ROOT / "book/references.bib").read_text(encoding="utf-8"), flags=re.M)[1:]:
        key, body = re.match(r"\{([^,]+),(.*)", entry, re.S).groups()
        assert key not in entries
        entries[key] = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M))
    for paper in PAPERS:
        entry = entries[paper.cite]
        assert re.sub(r"[{}\\]", "", entry["title"]) == paper.title
        assert (entry["year"], entry["eprint"], entry["url"]) == (str(paper.year), paper.arxiv, paper.arxiv_url)
        surnames = [name.split(",")[0].strip("{} ") for name in entry["author"].split(" and ")]
        assert len(surnames) == len(paper.authors)
        assert all(author.endswith(surname) for author, surname in zip(paper.authors, surnames, strict=True))


def test_find_names_what_there_is():
    assert registry.find("similarity", "temperature").module_name == "lossbook.similarity.temperature"
    with pytest.raises(ValueError, match="'similarities'.*classification, similarity"):
        registry.find("similarities", "temperature")
    with pytest.raises(ValueError, match="'temprature'.*temperature, isogclr"):
        registry.find("similarity", "temprature")
    with pytest.raises(ValueError, match="'kitchen'"):
        registry.find("similarity", "temperature").exists("kitchen")


# What is made from it


def test_everything_made_from_the_registry_is_as_the_registry_has_it():
    assert registry.differences() == {}


def test_check_command_fails_until_write_has_run(root, capsys):
    assert registry.main(["check"], root) == 1
    assert re.search(r"_toc.yml disagrees.*README.md disagrees.*\n-old\n", capsys.readouterr().err, re.S)
    assert registry.main(["write"], root) == 0
    assert registry.main(["check"], root) == 0


def test_paper_without_rooms_is_in_preparation_and_never_linked(root):
    made = registry.generated(root)
    assert set(made) == {Path("_toc.yml"), Path("README.md")}
    assert "chapters/" not in made[Path("_toc.yml")] and "labs/" not in made[Path("_toc.yml")]
    readme = made[Path("README.md")]
    assert readme.count("| in preparation |") == sum(PARTS.values())
    assert readme.startswith("# Title\n\nBefore.\n") and readme.endswith("\n\nAfter.\n") and "\nold\n" not in readme


def test_contents_and_pages_show_exactly_the_rooms_that_exist(root):
    new_paper.create("similarity", "temperature", root)
    (root / "chapters/similarity/groco.ipynb").touch()
    (root / "src/lossbook/similarity/tcm.py").touch()
    made = registry.generated(root)
    assert re.findall(r"\S*: (?:chapters|labs|book/api)/.*", made[Path("_toc.yml")]) == [
        "file: chapters/similarity/temperature",
        "file: labs/similarity/temperature",
        "file: chapters/similarity/groco",
        "file: book/api/index",
        "file: book/api/ops",
        "file: book/api/lab",
        "file: book/api/similarity",
    ]
    page = made[Path("book/api/similarity.md")]
    assert re.findall(r"automodule:: (\S+)", page) == ["lossbook.similarity.temperature", "lossbook.similarity.tcm"]
    assert re.findall(r"{doc}`(.*)`", page) == ["/chapters/similarity/temperature"]
    assert "In preparation: `isogclr`, `groco`, `pamc`, `proto_triplet`, `transductive`." in page


def test_pages_of_a_part_stand_after_its_chapters(root):
    (root / "chapters/language").mkdir(parents=True)
    (root / "chapters/language/reweighting.ipynb").touch()
    assert "preference_losses" not in registry.generated(root)[Path("_toc.yml")]
    (root / "chapters/language/preference_losses.ipynb").touch()
    found = re.findall(r"file: (chapters/.*)", registry.generated(root)[Path("_toc.yml")])
    assert found == ["chapters/language/reweighting", "chapters/language/preference_losses"]


def test_every_notebook_of_a_part_is_a_chapter_or_a_page():
    known = {paper.chapter for paper in PAPERS} | {page for part in registry.load() for page in part.pages}
    assert {path.relative_to(ROOT) for path in ROOT.glob("chapters/*/*.ipynb")} <= known


def test_readme_gets_its_section_once_and_an_open_marker_is_refused(root):
    (root / "README.md").write_text("# Title\n")
    registry.write(root)
    once = (root / "README.md").read_text(encoding="utf-8")
    assert once.startswith("# Title\n\n## The papers\n\n<!-- papers:begin -->\n")
    assert registry.write(root) == []
    (root / "README.md").write_text("<!-- papers:begin -->\n")
    with pytest.raises(ValueError, match=r"README\.md.*papers:end"):
        registry.generated(root)


# The repository's address


def test_address_of_the_repository_is_the_same_everywhere():
    owner_and_name = registry.repository().name
    owner, name = owner_and_name.split("/")
    files = [ROOT / file for file in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "CITATION.cff")]
    files += [ROOT / paper.lab for paper in LABS] + [ROOT / paper.chapter for paper in PAPERS if paper.ready]
    files += (ROOT / "book").glob("*.md")
    seen = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        for other in re.findall(rf"github\.com(?:/github)?/([\w.-]+/(?:lossbook|{re.escape(name)}))\b", text):
            assert other == owner_and_name, f"{file.name} names the repository {other}"
            seen.add(file.name)
        for other in re.findall(r"([\w-]+\.github\.io/[\w.-]*\w)", text):
            if other.endswith(f"/{name}"):
                assert other == f"{owner}.github.io/{name}", f"{file.name} names the book's page {other}"
    assert "pyproject.toml" in seen


@pytest.mark.parametrize("paper", LABS, ids=lambda paper: paper.name)
def test_lab_has_the_set_up_cell_and_its_badge(paper):
    cells = nbformat.read(ROOT / paper.lab, as_version=4).cells
    assert [cell.source for cell in cells if cell.cell_type == "code"][0] == new_paper.lab_setup()
    assert f"/colab-badge.svg)]({registry.repository().colab(paper.lab)})" in cells[0].source


# New papers


def test_new_paper_makes_four_rooms_with_the_headings_of_the_design(root):
    paper = registry.find("generative", "proximal", root)
    assert new_paper.create("generative", "proximal", root) == [paper.chapter, paper.module, paper.lab, paper.tests]
    assert headings(root / paper.chapter) == CHAPTER_HEADINGS
    assert headings(root / paper.lab) == LAB_HEADINGS
    chapter = nbformat.read(root / paper.chapter, as_version=4)
    assert chapter.cells[0].source == f"# {paper.title}\n\n```{{paper-card}} generative/proximal\n```"
    module = (root / paper.module).read_text()
    assert re.findall(r"^# (.+)$", module, re.M) == ["Definitions", "The method", "Variants"]
    assert paper.title in ast.get_docstring(ast.parse(module))
    tests = (root / paper.tests).read_text()
    wanted = ["The theorems as properties", "Closed forms", "Limits", "Bad input"]
    assert re.findall(r"^# (.+)$", tests, re.M) == wanted
    for path in ("src/lossbook/generative/__init__.py", paper.module, paper.tests):
        compile((root / path).read_text(), str(path), "exec")
    assert registry.differences(root) == {}


def test_new_lab_carries_the_address_of_the_configuration(root):
    new_paper.create("generative", "proximal", root)
    lab = nbformat.read(root / "labs/generative/proximal.ipynb", as_version=4)
    address = "https://colab.research.google.com/github/someone/fork/blob/trunk/labs/generative/proximal.ipynb"
    assert f"({address})" in lab.cells[0].source
    code = [cell.source for cell in lab.cells if cell.cell_type == "code"]
    assert code == [new_paper.lab_setup(root)]
    assert '"lossbook[lab] @ git+https://github.com/someone/fork"' in code[0]


def test_new_notebooks_have_the_same_normalized_bytes_every_time(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(root, other, dirs_exist_ok=True)
    for place in (root, other):
        new_paper.create("vision", "yolov9", place)
    for room in ("chapters", "labs"):
        text = (root / room / "vision/yolov9.ipynb").read_bytes()
        assert text == (other / room / "vision/yolov9.ipynb").read_bytes()
        assert json.loads(text)["metadata"] == new_paper.METADATA
        nbformat.validate(nbformat.reads(text.decode(), as_version=4))


def test_first_paper_of_a_part_begins_its_assignment_and_the_second_leaves_it(root):
    new_paper.create("generative", "proximal", root)
    path = root / "labs/generative/assignment.ipynb"
    made = nbformat.read(path, as_version=4)
    wanted = nbformat.read(registry.ROOT / "labs/similarity/assignment.ipynb", as_version=4)
    address = registry.repository(root).colab(Path("labs/generative/assignment.ipynb"))
    assert made.cells[0].source.startswith("# Assignment: generative\n") and f"({address})" in made.cells[0].source
    assert [cell.source for cell in made.cells[1:]] == [cell.source for cell in wanted.cells[1 : len(made.cells)]]
    path.write_text("precious")
    second = next(paper for paper in registry.papers(root) if paper.part == "generative" and paper.slug != "proximal")
    new_paper.create("generative", second.slug, root)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_new_modules_keep_the_line_length(paper, root):
    new_paper.create(paper.part, paper.slug, root)
    assert max(map(len, (root / paper.module).read_text().splitlines())) <= 120


@pytest.mark.parametrize("room", registry.ROOMS)
def test_new_paper_overwrites_nothing(room, root):
    path = root / getattr(registry.find("language", "npo", root), room)
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    before = sorted(root.rglob("*"))
    with pytest.raises(FileExistsError, match=path.name):
        new_paper.create("language", "npo", root)
    assert sorted(root.rglob("*")) == before and path.read_text() == "precious"


def test_new_paper_command_refuses_an_unknown_paper(capsys):
    with pytest.raises(SystemExit, match="no slug 'nope'.*robust_dpo"):
        new_paper.main(["language", "nope"])
    with pytest.raises(SystemExit, match="no part 'nope'"):
        new_paper.main(["nope", "npo"])
