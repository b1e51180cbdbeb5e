package keeper

import (
	"net"

	"golang.org/x/sys/unix"
)

// peerUID tells who is at the other end of a Unix socket: the kernel noted it
// when the connection was made. -1 with an error.
func peerUID(c net.Conn) (int, error) {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return -1, err
	}
	var who *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { who, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err == nil {
		err = failed
	}
	if err != nil {
		return -1, err
	}
	return int(who.Uid), nil
}
