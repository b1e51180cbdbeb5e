// Package guest is what the keeper on the host and the helper in the guest
// agree on: the helper's config file and the protocol by which the helper asks
// for a way out.
//
// The helper is hostile to the keeper (whoever is root in the guest owns it):
// the keeper takes nothing from it but the name of a service, chosen from a
// list that the host fixed.
package guest

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
)

// Transports of Config.
const (
	TransportFD   = "fd"   // FD is a SOCK_SEQPACKET socket to the Broker
	TransportUnix = "unix" // each relay dials its own Socket
)

// ServiceEgress is the egress gate.
const ServiceEgress = "egress"

// Greeting is what the keeper answers on a bottle's socket (engine.Socket) as
// long as the guest is being started: proof for both that the socket which the
// engine was asked for is in the guest and leads to this keeper. The helper
// answers it with a Report.
const Greeting = "bottle: this way out\n"

// LookupPath is what the guest's resolver asks the gate for, over
// ServiceEgress, as GET LookupPath + "?name=" + NAME with Host LookupHost. The
// answer is a Lookup, or a refusal like any other of the gate's.
const (
	LookupPath = "/.bottle/lookup"
	LookupHost = "gate.bottle.invalid"
)

// Lookup is what is open of a name.
type Lookup struct {
	Services []Service `json:"services"`
}

// Service is a port and what the policy's rule says about it.
type Service struct {
	Port     int    `json:"port"`
	Protocol string `json:"protocol"` // tls | http | ssh | tcp
}

// Config is /opt/bottle/config.json: all the helper knows. It holds no secret.
type Config struct {
	Transport string  `json:"transport"` // fd | unix
	FD        int     `json:"fd,omitempty"`
	Relays    []Relay `json:"relays"`
	Hostname  string  `json:"hostname"`
	User      User    `json:"user"`
	Files     []File  `json:"files,omitempty"` // laid into the home where absent

	// CACert is the bottle's own CA, PEM. It is appended to every bundle that
	// the image has.
	CACert string `json:"ca_cert,omitempty"`
	// CABundle is a file in the guest that holds the whole bundle; it becomes
	// /etc/ssl/certs/ca-certificates.crt in an image that has none.
	CABundle string `json:"ca_bundle,omitempty"`
	// Truststore is a file in the guest that holds the same for Java. It takes
	// the place of those that the image has.
	Truststore string `json:"truststore,omitempty"`

	// Copy is a path in the guest where the helper puts a copy of itself; "" for
	// none. What lies on the host each start of it reads anew.
	Copy string `json:"copy,omitempty"`

	// Folders are those whose inode numbers the host wants to be told in a Report
	// (transport unix).
	Folders []string `json:"folders,omitempty"`

	// Addresses are those that the policy opens as such. The guest takes them for
	// its own, so that what connects to one gets to the helper.
	Addresses []Address `json:"addresses,omitempty"`

	// PidsMax is held by the guest kernel's own pids cgroup (gVisor). Zero:
	// no limit.
	PidsMax int `json:"pids_max,omitempty"`
	// Prepared tells that /etc was written by the host: only the home and the
	// limit are left to do.
	Prepared bool `json:"prepared,omitempty"`
}

// Address is one address or a block of them.
type Address struct {
	CIDR     string    `json:"cidr"`
	Services []Service `json:"services"`
}

// Relay forwards TCP connections on Listen to a service of the host.
type Relay struct {
	Listen  string `json:"listen"`           // "127.0.0.1:3128"
	Service string `json:"service"`          // transport fd: a name the Broker serves
	Socket  string `json:"socket,omitempty"` // transport unix: a path in the guest
}

// User is who the agent is in the guest.
type User struct {
	Name string `json:"name"`
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
	Home string `json:"home"`
}

// File is a small text file below the home.
type File struct {
	Path    string `json:"path"` // relative to the home
	Content string `json:"content"`
}

// Kinds of packets. The guest sends ready once, or failed, and dial; the host
// answers each dial with conn (and a descriptor) or refused.
const (
	kindReady   = "ready"
	kindFailed  = "failed"
	kindDial    = "dial"
	kindConn    = "conn"
	kindRefused = "refused"
)

// packet is the one form of all messages, as compact JSON.
type packet struct {
	Kind    string `json:"t"`
	ID      uint64 `json:"id,omitempty"`
	Service string `json:"service,omitempty"`
	Text    string `json:"text,omitempty"`
}

// maxText bounds what a guest may have printed on the host.
const maxText = 1024

func (p packet) encode() []byte {
	if len(p.Text) > maxText {
		p.Text = p.Text[:maxText]
	}
	b, err := json.Marshal(p)
	if err != nil {
		panic(fmt.Sprintf("guest: packet of strings and numbers: %v", err))
	}
	return b
}

func decode(b []byte) (packet, error) {
	var p packet
	err := json.Unmarshal(b, &p)
	return p, err
}

// printable bounds a hostile text, and keeps it from moving a terminal's cursor
// or faking log lines.
func printable(s string) string {
	if s = fault.Line(s); len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "")
	}
	return s
}

// Adoption turns a parked guest, a copy of one that others are copies of too,
// into one bottle's own. It goes to "guest adopt" on stdin, after the copy was
// given its own Config.
type Adoption struct {
	Hostname  string `json:"hostname"`
	UnixNano  int64  `json:"unix_nano"`  // the copy's clock stood still
	Seed      []byte `json:"seed"`       // SeedSize bytes: copies have one another's random numbers
	MachineID string `json:"machine_id"` // 32 hex digits
	BootID    string `json:"boot_id"`    // a UUID
}

// SeedSize is what the guest kernel's random numbers are begun anew with.
const SeedSize = 64
