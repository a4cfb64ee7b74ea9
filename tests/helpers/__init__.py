"""What the tests of every op share: one file per technique, and ``routing_cases`` for capsule routing's own inputs."""
