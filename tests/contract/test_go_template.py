"""The renderer of Go templates."""

import pytest

from tests.contract.go_template import TemplateError, render

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ range .Messages }}[{{ .Role }}]{{ .Content }}{{ end }}>", "[system]Be brief.[user]Hi>"),
        ("{{- range .Messages }}\n{{- .Role }} {{ end -}}\n  end", "system user end"),
        ('{{ range .Messages }}{{ if eq .Role "user" }}U{{ else }}?{{ end }}{{ end }}', "?U"),
        (
            '{{ range .Messages }}{{ if eq .Role "a" }}A{{ else if ne .Role "user" }}S{{ else }}U{{ end }}{{ end }}',
            "SU",
        ),
        ('{{ if ne (index .Messages 0).Role "system" }}no {{ end }}system', "system"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ end }}", "0system1user"),
        (
            "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}last{{ end }}{{ end }}",
            "last",
        ),
        ("{{ range .Messages }}{{ $r := .Role }}{{ $r }},{{ end }}", "system,user,"),
        ("{{ .System }}|{{ .Prompt }}|{{ .Response }}", "Be brief.|Hi|"),
        ('{{ "{{" }}{{/* nothing */}}x', "{{x"),
        ("{{ if and .System (not .Tools) }}yes{{ end }}{{ if or .Tools .Suffix }}no{{ end }}", "yes"),
    ],
)
def test_renders(template: str, expected: str) -> None:
    assert render(template, TALK) == expected


def test_neighbours_of_one_role_are_merged() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert render("{{ range .Messages }}<{{ .Content }}>{{ end }}", talk) == "<a\n\nb>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ if .System }}x",
        "{{ end }}",
        "{{ .Messages",
        "{{ frobnicate .Role }}",
        "{{ $x }}",
        "{{ (len .System }}",
    ],
)
def test_refuses(template: str) -> None:
    with pytest.raises(TemplateError):
        render(template, TALK)
