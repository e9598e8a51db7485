"""Two test processes share the cores: one thread each. Tests of pages share a browser."""

import os

import pytest
from chromium import opened

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = opened(tmp_path_factory.mktemp("chromium"))
    if driver is None:
        pytest.skip("needs chromium and chromium-driver, which `make test` installs as root")
    yield driver
    driver.quit()
