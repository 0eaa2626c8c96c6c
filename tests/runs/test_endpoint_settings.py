"""Addresses, keys and numbers of endpoints: what is refused, and that no key is told."""

import os
from dataclasses import replace

import pytest

from domino_jax.runs.endpoint_settings import EndpointError, EndpointSettings

KEY = "sk-very-secret-4711"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"urls": ()}, "no endpoint is given"),
        ({"urls": ("localhost:8000",)}, "give a URL such as"),
        ({"urls": ("http://[::1",)}, r"is 'http://\[::1'; give a URL such as"),
        ({"urls": ("http://localhost:80a/v1",)}, "is 'http://localhost:80a/v1'; give a URL such as"),
        ({"urls": (f"http://me:{KEY}@host",)}, "for 'host' holds a user"),
        ({"urls": (f"me:{KEY}@host:80",)}, "for 'host:80' holds a user"),
        ({"urls": (f"ftp://{KEY}@host/v1?a=1",)}, "for 'host/v1' holds a user"),
        ({"urls": (f"http://me:1{KEY}/@[host",)}, r"for '\[host' holds a user"),
        ({"urls": (f"http://host/v1?key={KEY}",)}, "holds a user, a query"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"request_timeout_s": 0.0}, "request_timeout_s is 0"),
        ({"max_retries": -1}, "max_retries is -1"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes, said):
    with pytest.raises(EndpointError, match=said) as caught:
        EndpointSettings(**{"urls": ("http://h",)} | changes)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("wrong", [KEY + "\r", KEY + "\n", f"Bearer {KEY}", KEY + "\x00", f"“{KEY}”"])
def test_a_key_that_no_header_carries_is_not_told(monkeypatch, wrong):
    monkeypatch.setattr(os, "environ", os.environ | {"THE_KEY": wrong})  # the system's own takes no NUL
    with pytest.raises(EndpointError, match=r"variable 'THE_KEY' \(--api-key-env\) holds more than a key") as caught:
        EndpointSettings(("http://h",), api_key_env="THE_KEY")
    assert KEY not in str(caught.value)


def test_a_base_url_gets_its_version():
    urls = EndpointSettings(("http://h:1", "http://h:1/v1/", "https://h/x/v1/chat/completions")).urls
    assert urls == ("http://h:1/v1", "https://h/x/v1")
    assert [replace(EndpointSettings(urls), retry_delay_s=1.0).delay_s(n) for n in (1, 2, 3, 99)] == [1, 2, 4, 60]
