// So that the compiler takes functions without a body, which are gVisor's.
