"""What the tests of findings ask of a diagnosis."""

from extend.doctor import doctor
from tests.doctor.configs import load


def error(diagnosis, what):
    """The one error about `what`."""
    found = [f for f in diagnosis.errors if f.what == what]
    assert len(found) == 1, diagnosis.to_text()
    return found[0]


def theta_of(diagnosis):
    return {r.reader: r.main.parameters["rope_theta"] for r in diagnosis.readings}


def lengths_of(diagnosis):
    return {r.reader: r.max_len for r in diagnosis.readings}


def check_cured(directory, out, **options):
    """A fix is written, passes, and leaves the input as it was."""
    before = load(directory)
    written = doctor(directory, fix=True, out=out, **options)
    assert written.ok and written.output == out
    assert load(directory) == before
    again = doctor(out, readers=options.get("readers"))
    assert again.ok and not again.changes
    return again
