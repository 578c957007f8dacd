"""One Chromium for all tests of the demo."""

import pytest
from browser import chromium, visit


@pytest.fixture(scope="session")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def person(browser, address):
    """Opens pages of the module's app for one test, each in its own session."""
    pages = []

    def come(**options):
        pages.append(visit(browser, address, **options))
        return pages[-1]

    yield come
    for page in pages:
        assert page.errors == []
        page.context.close()
