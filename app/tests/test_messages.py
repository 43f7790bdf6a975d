"""Tests that the app writes the same messages as Django. Its code is only faster."""

import pytest
from django.core.mail import EmailMultiAlternatives

from emails import messages


@pytest.mark.parametrize(
    ("subject", "sender", "headers"),
    [
        ("Hello", "Shop <shop@example.org>", {"X-Short": "plain"}),
        (
            "Grüße an alle, die es angeht, und an alle anderen auch, so lang es eben ist",
            "a@b.org",
            {},
        ),
        ("long " * 40, "a@b.org", {"List-Unsubscribe": "<https://example.org/" + "x" * 200 + ">"}),
        ("x" * 67, "a@b.org", {}),
        ("x" * 68, "a@b.org", {"X-Spaces": "  two before, two after  ", "X-Empty": ""}),
    ],
)
@pytest.mark.parametrize("parts", ["text", "html", "attachment"])
def test_message_has_the_same_bytes_as_djangos(subject, sender, headers, parts):
    message = EmailMultiAlternatives(
        subject,
        "Body\n.dot\nÜ",
        sender,
        ["bob@example.org"],
        headers={"Message-ID": "1", **headers},
    )
    if parts != "text":
        message.attach_alternative("<p>Body</p>", "text/html")
    if parts == "attachment":
        message.attach("a name that is neither short nor plain ü.bin", b"\0\1", "application/x-y")
    made = message.message()
    if made.is_multipart():
        made.set_boundary("fixed")
        for number, part in enumerate(part for part in made.walk() if part.is_multipart()):
            part.set_boundary(f"fixed{number}")
    expected = made.as_bytes(linesep="\r\n")
    message.message = lambda: made
    assert messages.as_bytes(message) == expected
