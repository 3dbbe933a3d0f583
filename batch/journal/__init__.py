"""What was asked, accepted, paid and answered: the states of a job and the database that keeps them."""
