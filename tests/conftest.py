"""Options of the test run."""

from balanced_det.config.imports import import_modules


def pytest_addoption(parser):
    parser.addoption(
        "--imports",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules or .py files to import first: the tests of all losses, samplers and box "
        "losses then run on those that they register, too",
    )


def pytest_configure(config):
    import_modules(config.getoption("--imports"))
