package sidecar

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// listener gives the user whose process listens on a port, from /proc/net/tcp
// (proc_net_tcp.txt in the kernel's documentation).
func listener(at netip.AddrPort) (uid int, ok bool) {
	raw, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0, false
	}
	ip := at.Addr().As4()
	local := fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(ip[:]), at.Port())
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) > 7 && f[1] == local && f[3] == "0A" { // LISTEN
			uid, err := strconv.Atoi(f[7])
			return uid, err == nil
		}
	}
	return 0, false
}
