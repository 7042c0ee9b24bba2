"""The paper's measurements as pure functions over records and numbers."""
