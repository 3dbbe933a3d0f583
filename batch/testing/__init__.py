"""Fakes that ship: users test their own code with them, and we hold them to the real things by contract."""
