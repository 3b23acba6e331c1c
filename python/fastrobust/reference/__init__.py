"""Every op in plain torch: readable, any dtype and device. These define the ops and are the oracle of the tests."""
