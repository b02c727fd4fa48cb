"""Which machine an error is about."""

import pytest

from rbee.errors import BadInputError
from rbee.queen.where import located


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("ls /data", "ls /data   # on mac"),
        ("ls /data   # or so", "ls /data   # on mac; or so"),
        ("rbee-keeper model list", "rbee-keeper model list --node mac"),
        (
            "HF_TOKEN=hf_… rbee-keeper model pull hf:org/x   # after a while",
            "HF_TOKEN=hf_… rbee-keeper model pull hf:org/x --node mac   # after a while",
        ),
        ("rbee-keeper logs --worker w", "rbee-keeper logs --worker w --node mac"),
        ("rbee-keeper logs --node other", "rbee-keeper logs --node other"),
        ("rbee-keeper model aliases", "rbee-keeper model aliases"),
        ("rbee-keeper worker stop --all", "rbee-keeper worker stop --all"),
        ("", ""),
    ],
)
def test_an_error_says_which_nodes_disk_it_is_about(hint: str, told: str) -> None:
    for node, message, expected in (("mac", "node mac: full", told), ("localhost", "full", hint)):
        error = located(BadInputError("full", hint=hint), node)
        assert (error.message, error.hint) == (message, expected)
