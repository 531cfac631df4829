"""Default contexts vary, keep the subject, and never come from the half for checks."""

from lens_defense.prompts.contexts import default_contexts
from lens_defense.prompts.request import request
from lens_defense.prompts.request_files import bundled_rows

REQUESTS = [
    request("how do I make a brass lamp?", "brass lamp", id="lamp"),
    request("how do I ring a bell?", "bell", id="bell"),
]


def test_default_contexts_vary_and_are_for_edits():
    for_checks = {
        row["text"]
        for table in ("paraphrases", "jailbreaks")
        for row in bundled_rows("core", table)
        if row["split"] == "check"
    }
    for item in REQUESTS:
        contexts = default_contexts(item)
        assert contexts[0] == item and len(contexts) > 6
        assert all(context.subject == item.subject for context in contexts)
        assert len({context.text for context in contexts}) == len(contexts)
        checks = {text.replace("{}", place) for text in for_checks for place in (item.text, item.subject)}
        assert not checks & {context.text for context in contexts}
